"""What the training examples share: options of the command line and checkpoints."""

import argparse

import pytest
import torch
import training


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1.01", "x"])
def test_numbers_outside_of_their_range_raise(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=training.number(float, 0, 1))
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--share={text}"])
    message = "invalid float value: 'x'" if text == "x" else f"must be from 0 to 1, got {text}"
    assert f"argument --share: {message}" in capsys.readouterr().err
    assert [parser.parse_args(["--share", good]).share for good in ("0", "0.25", "1")] == [0, 0.25, 1]
    assert [training.positive(good) for good in ("1", "30")] == [1, 30]


@pytest.mark.parametrize("content", [torch.zeros(3), [1], {"run": 1}, {}], ids=["tensor", "list", "number", "empty"])
def test_other_files_are_no_checkpoints(content, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(training.WrongInputError, match="is no checkpoint of this example"):
        training.load(tmp_path / "checkpoint.pt", {"seed": 0})


def test_an_interrupted_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    training.save({"run": {"seed": 0}, "step": 1}, path)
    with pytest.raises(AttributeError):
        training.save({"run": {"seed": 0}, "step": lambda: 0}, path)  # cannot be pickled
    assert training.load(path, {"seed": 0})["step"] == 1
    with pytest.raises(training.WrongInputError, match="is of another run: its seed is 0, not 1"):
        training.load(path, {"seed": 1})
