"""The classes of public detectors."""

from posepress.labels import Palette, distinct

_COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench "
    "bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard "
    "sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon "
    "bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table "
    "toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors "
    "teddy_bear hair_drier toothbrush"
)


# The 80 classes of COCO's boxes in the order of https://cocodataset.org, as YOLO detectors number them.
COCO_80 = Palette(tuple(_COCO.split()), distinct(80))

# COCO's own numbers, as torchvision's detectors give them: 0 is the background, and ten others name no class.
_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_USED = iter(COCO_80.names)
COCO_91 = Palette(tuple(f"none_{n}" if n in _UNUSED else next(_USED) for n in range(91)), distinct(91))
