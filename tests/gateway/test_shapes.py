"""The types of what hive answers: each is in the document; that answers are so is steps/test_openapi.py."""

from typing import is_typeddict

from docs import generate
from hive.gateway import shapes
from hive.gateway.openapi import document


def test_every_shape_is_that_of_an_answer() -> None:
    own = {
        name
        for name, kind in vars(shapes).items()
        if is_typeddict(kind) and kind.__module__ == shapes.__name__
    }

    assert len(own) > 30
    assert own - document(generate.application())["components"]["schemas"].keys() == set()
