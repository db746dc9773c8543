"""The former module of framings; it forwards to their new modules for one release."""

from posepress.moved import forward

__getattr__ = forward(
    "evaluation.views",
    {
        "WholeImage": "posepress.framing.whole_image",
        "PersonCrops": "posepress.framing.person_crops",
        "*": "posepress.geometry",
    },
)
