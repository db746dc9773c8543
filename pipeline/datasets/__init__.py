"""Images and labels, on disk in COCO's format or generated into it."""
