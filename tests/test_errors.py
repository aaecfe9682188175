import inspect
import pickle

import pytest

from fusionpass import errors
from fusionpass.errors import FusionpassError, nearest

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, FusionpassError)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("the scale is 0",), "the scale is 0"),
        (("the scale is 0", "model.q_proj"), "model.q_proj: the scale is 0"),
        (("the scale is 0", "", "Name it in skip"), "the scale is 0. Name it in skip"),
        (("the scale is 0", "model.q_proj", "Name it in skip"), "model.q_proj: the scale is 0. Name it in skip"),
    ],
)
def test_what_where_and_the_next_step(arguments, text):
    error = FusionpassError(*arguments)
    assert str(error) == text
    assert (error.what, error.where, error.next_step) == (*arguments, "", "")[:3]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_each_is_caught_by_the_base_and_says_what_it_is_for(cls):
    with pytest.raises(FusionpassError, match=r"^there: what\. next$"):
        raise cls("what", "there", "next")
    assert cls.__doc__
    assert cls.__name__ == "FusionpassError" or cls.__name__.endswith("Error")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_they_survive_a_process_boundary(cls):
    # pytest-xdist and Inductor's compile workers send exceptions back.
    error = pickle.loads(pickle.dumps(cls("what", "there", "next")))
    assert type(error) is cls
    assert (str(error), error.what, error.where) == ("there: what. next", "what", "there")


def test_nearest_names_the_closest_and_all():
    assert nearest("norm.lama", ["quant", "norm.llama"]) == "Did you mean 'norm.llama'? Known: norm.llama, quant"


def test_nearest_does_not_guess_wildly():
    assert nearest("zzz", {"b", "a"}) == "Known: a, b"


def test_nearest_takes_any_iterable_once():
    assert nearest("fuze", (name for name in ("fuse", "lower"))) == "Did you mean 'fuse'? Known: fuse, lower"
