"""The call graph that the readability figures are computed from."""

import ast

import pytest
from call_graph import CallGraph

A = """
from smollm2.b import Box, Double, Net, helper

def root(box: "Box", number):
    made = Net()
    box.open()
    box.net(number)
    made.weight(number)
    Double.apply(number)
    number.unknown()
    return map(helper, number)

def outside(): ...
"""
B = """
def helper(x): ...
def deep(): ...

class Net:
    def forward(self, x): ...
    def weight(self, x): ...
    def unused(self): ...

class Box:
    net: Net
    def open(self):
        deep()

class Double:
    def forward(ctx, x): ...
    def backward(ctx, x): ...
"""


@pytest.fixture
def graph() -> CallGraph:
    return CallGraph({"a": ast.parse(A), "b": ast.parse(B)})


def test_functions_and_methods_are_reached_and_nothing_else(graph: CallGraph) -> None:
    expected = {"a.root", "b.helper", "b.deep", "b.Box.open", "b.Net", "b.Net.forward", "b.Net.weight"}
    assert graph.reach("a.root", set()).keys() == expected | {"b.Double", "b.Double.forward"}


def test_a_stop_is_not_entered(graph: CallGraph) -> None:
    reached = graph.reach("a.root", {"b.Box", "b.Net"})
    assert reached.keys() == {"a.root", "b.helper", "b.Double", "b.Double.forward"}


def test_lines_are_those_of_the_definition(graph: CallGraph) -> None:
    assert graph.reach("a.root", {"b"}) == {"a.root": 8}
