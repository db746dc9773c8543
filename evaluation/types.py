"""The former module of these types; it forwards to their new modules for one release."""

from posepress.moved import forward

__getattr__ = forward(
    "evaluation.types",
    {
        **dict.fromkeys(("Poses", "Sample", "SemanticMask"), "posepress.results"),
        **dict.fromkeys(("number", "whole"), "posepress.checks"),
        "FieldSpec": "posepress.spec:OutputSpec",
        "View": "posepress.geometry",
        "People": "evaluation.truth",
        "*": "posepress.spec",
    },
)
