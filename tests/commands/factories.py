"""What `module:factory` may name."""

import torch

from tests.report.stack import Stack, rows


def stack():
    torch.manual_seed(0)
    return Stack(4, odd=(2,)), (rows(),)


def keyword():
    return Stack(1), (), {"x": rows(3)}


def function():
    return lambda x: torch.nn.functional.silu(x) * x, [rows()]


def bare():
    return Stack(1)


def wrong():
    return Stack(1), rows()


def linear():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32)), (torch.randn(3, 32),)
