"""Proves that an export leaves the process's logging as it found it."""

from __future__ import annotations

import logging

import openvino as ov
import torch

from dovetail.export.quiet import quiet_torch


def test_the_root_logger_stays_as_it_was() -> None:
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    with quiet_torch():
        ov.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
        assert root.level == logging.ERROR, "the converter has become better; quiet_torch may forget about it"
    assert (root.level, list(root.filters), list(root.handlers)) == before
    assert root.level != logging.ERROR
