"""The skeletons that public pose networks and data sets use."""

from posepress.labels import Skeleton

# Names, limbs and sigmas of COCO keypoints: https://cocodataset.org/#keypoints-eval and person_keypoints_val2017.json.
COCO_17 = Skeleton(
    names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    ),
    limbs=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
        0.089,
    ),
)  # fmt: skip

# The 18 keypoints of OpenPose's COCO model (arXiv:1812.08008), limbs in the order of its PAF channels. The neck is the
# middle of the shoulders and is no COCO keypoint; it gets the shoulders' sigma.
OPENPOSE_18 = Skeleton(
    names=(
        "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
        "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
        "right_ear", "left_ear",
    ),
    limbs=(
        (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 2), (2, 3), (3, 4), (2, 16), (1, 5), (5, 6), (6, 7),
        (5, 17), (1, 0), (0, 14), (0, 15), (14, 16), (15, 17),
    ),
    sigmas=(
        0.026, 0.079, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.107, 0.087, 0.089, 0.025, 0.025,
        0.035, 0.035,
    ),
)  # fmt: skip
