from __future__ import annotations

from pathlib import Path

import pytest

from mmicl_core.data.open_emoji import KEYWORDS_PACKAGE, LABELS_PACKAGE, NAMES_PACKAGE, STYLES
from pipelines.backbone import BACKBONES

NOTICE = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_notice_names_author_licence_and_package_of_every_style(style):
    (line,) = [line for line in NOTICE if line.split()[:1] == [style.name]]
    name, _, version = style.package.rpartition("@")
    assert style.author.split()[0] in line
    assert style.licence in line.split()
    assert f"{name} {version}" in line


@pytest.mark.parametrize("package", [NAMES_PACKAGE, LABELS_PACKAGE, KEYWORDS_PACKAGE])
def test_notice_names_every_package_of_words(package):
    assert any(line.startswith(package.replace("@", " ")) for line in NOTICE)


@pytest.mark.parametrize(
    "wheel", [wheel for kit in BACKBONES.values() for wheel in kit.wheels], ids=lambda wheel: wheel.project
)
def test_notice_names_every_package_that_a_backbone_is_built_of(wheel):
    assert any(line.startswith(f"{wheel.project} {wheel.version} ") for line in NOTICE)


def test_notice_names_no_style_that_is_not_there():
    start = next(number for number, line in enumerate(NOTICE) if line.startswith("style "))
    listed = []
    for line in NOTICE[start + 1 :]:
        if not line:
            break
        if not line.startswith(" "):
            listed.append(line.split()[0])
    assert listed == [style.name for style in STYLES]
