"""The documentation: its Python runs, its links resolve, its tables agree with committed runs and with the tests."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import assert_same_bits

import tsm_jit
from tsm_jit.bench import report

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
README, GUIDES = ROOT / "README.md", ROOT / "examples" / "README.md"
PAGES = [README, GUIDES, *(ROOT / name for name in ("CONTRIBUTING.md", "kernels/README.md", "tsm_jit/_jit/README.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [README, GUIDES], ids=lambda page: page.parent.name)
def test_every_block_runs_after_the_ones_before(page):
    names: dict = {}
    for block in blocks(page):
        exec(block, names)
    assert isinstance(names["net"].layer1[0].conv1, tsm_jit.TemporalShift)


def test_equivalent_to():
    (block,) = [block for block in blocks(README) if "zeros_like" in block]
    x = torch.randn(2 * 8, 64, 56, 56)
    names = {"torch": torch, "x": x, "y": tsm_jit.temporal_shift(x, 8)}
    exec(block, names)
    assert_same_bits(names["expected"].flatten(0, 1), names["y"])


def test_the_readme_is_short_and_its_first_block_are_the_two_set_up_commands():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    commands = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()
    assert len(commands) == 2
    assert text.index("```") == text.index("```bash")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_resolve(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def test_the_tables_of_results_have_the_numbers_of_the_committed_runs():
    sections = re.findall(r"<!-- python -m tsm_jit (.*?) -->\n\n(.*?)\n<!-- end -->", GUIDES.read_text(), re.DOTALL)
    paths = [command.split()[-1] for command, _ in sections]
    runs = ["h200/time_parallel", "h200/streams", "h100/network", "h200/families", "h100/bench"]
    assert paths == [f"results/{run}.json" for run in runs]
    for path, (_, section) in zip(paths, sections, strict=True):
        text = (GUIDES.parent / path).read_text()
        assert len(text.splitlines()) == 1  # minified, as the command writes it
        assert numbers(report.markdown(json.loads(text))) == numbers(section)


def test_the_tables_of_features_are_what_the_tests_show(request):
    """Every cell of the tables has a test, and every feature that a test shows has its cell."""
    if not {path.name for path in (ROOT / "tests").rglob("test_*.py")} <= request.config.collected:
        pytest.skip("needs the whole suite collected")
    cells = {}
    for heads in ("CPU | CUDA | compiled", "convert | in place | checkpoint keys | compiled | ONNX | online"):
        table = re.search(rf"^\| \| {re.escape(heads)} \|\n\|.*\n((?:\|.*\n)+)", GUIDES.read_text(), re.MULTILINE)
        for line in table[1].splitlines():
            name, *texts = line.strip("| ").split(" | ")
            columns = zip(heads.split(" | "), texts, strict=True)
            cells |= {(name, column): {text} for column, text in columns if text != "n/a"}
    assert cells == request.config.features
