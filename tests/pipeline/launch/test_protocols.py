"""The check of a class against the protocol of its group."""

import pytest

from pipeline.launch.protocols import PROTOCOLS, check_members
from posepress.contracts import Decoder, Framing
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage


class Late:
    """A framing with attributes that are set when an object is made."""

    def __init__(self):
        self.one_size, self.averaged = True, False

    def views(self, size, resolution, spec, boxes=None):
        return []

    bases = reader = views


class Anything:
    def __getattr__(self, name):
        return None


@pytest.mark.parametrize("kind", [WholeImage, Late, Anything])
def test_what_has_the_methods_is_taken(kind):
    check_members("framing", "nets.Framing", kind)


def test_stubs_of_the_protocol_are_no_methods():
    class Empty(Decoder):
        pass

    with pytest.raises(UserError, match=r"decoder._target_=nets.Empty: the class has no `decode`; .*contracts.Decoder"):
        check_members("decoder", "nets.Empty", Empty)


def test_a_data_set_says_which_splits_it_has():
    class Half:
        def open(self, split):
            raise NotImplementedError

        def digest(self, splits):
            return ""

    with pytest.raises(UserError, match="the class has no `__contains__`"):
        check_members("stages.tune.data", "nets.Half", Half)


def test_other_options_have_no_protocol():
    assert PROTOCOLS["framing"] is Framing
    check_members("pruner", "nets.Anything", int)
