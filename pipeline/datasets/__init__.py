"""Images and labels in COCO's format, either given on disk or generated."""
