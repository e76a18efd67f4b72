from __future__ import annotations

import torch

from mmicl_core.data.augment import GREY_SHARE, augment, augment_versions, variant_key, vary_turns
from tests.fakes import episode_row


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 20, 20, generator=_generator(9)) * 2 - 1


def test_a_white_picture_stays_white_whatever_is_done_to_it() -> None:
    white = torch.ones(64, 3, 20, 20)
    assert torch.allclose(augment(white, _generator()), white)


def test_what_comes_in_from_outside_is_white() -> None:
    black = torch.full((64, 3, 20, 20), -1.0)
    # A shift or a turn brings in the outside at a corner of some of 64 pictures.
    assert (augment(black, _generator())[..., 0, 0] == 1).any()


def test_augmentation_follows_its_generator_and_nothing_else() -> None:
    pixels = _pixels()
    assert torch.equal(augment(pixels, _generator(1)), augment(pixels, _generator(1)))
    assert not torch.allclose(augment(pixels, _generator(1)), augment(pixels, _generator(2)))


def test_every_picture_is_changed_in_its_own_way() -> None:
    same = _pixels(1).expand(8, -1, -1, -1)
    changed = augment(same, _generator())
    assert all(not torch.allclose(changed[0], other) for other in changed[1:])


def test_the_share_of_pictures_that_lose_their_colour_is_as_set() -> None:
    changed = augment(_pixels(1).expand(1000, -1, -1, -1), _generator())
    grey = (changed.amax(1) - changed.amin(1) < 1e-6).flatten(1).all(1).float().mean()
    # Three sigma of 1,000 draws are at most 0.05.
    assert abs(float(grey) - GREY_SHARE) < 0.05 < GREY_SHARE


def test_turns_name_versions_drawn_by_the_number_of_the_visit() -> None:
    row = episode_row(["a", "b", "c"], ["x", "y", "x"])
    keys = {picture: {variant_key(picture, number) for number in range(3)} for picture in "abc"}
    drawn: dict[str, set[str]] = {picture: set() for picture in "abc"}
    for visit in range(40):
        varied = vary_turns(row, visit, 3)
        assert varied == vary_turns(row, visit, 3)
        for before, after in zip(row["turns"], varied["turns"], strict=True):
            drawn[before["picture"]].add(after["picture"])
            version = {"version": after["version"]} if "version" in after else {}
            assert variant_key(before["picture"], version.get("version", 0)) == after["picture"]
            assert before | {"picture": after["picture"]} | version == after
    assert drawn == keys
    assert row == episode_row(["a", "b", "c"], ["x", "y", "x"])


def test_question_that_goes_on_about_the_picture_before_gets_no_version() -> None:
    row = episode_row(["a", "b"], ["x", "y"])
    row["turns"].insert(1, row["turns"][0] | {"picture": None, "image": None})
    for visit in range(20):
        assert vary_turns(row, visit, 3)["turns"][1] == row["turns"][1]


def test_one_version_leaves_a_row_as_it_is() -> None:
    row = episode_row(["a", "b", "c"], ["x", "y", "x"])
    assert vary_turns(row, 7, 1) == row


def test_turns_vary_in_the_query_alone_where_demonstrations_are_read_before() -> None:
    row = episode_row(["a", "b", "c"], ["x", "y", "x"])
    varied = [vary_turns(row, visit, 4, query_only=True)["turns"] for visit in range(40)]
    assert all(turns[:-1] == row["turns"][:-1] for turns in varied)
    assert {turns[-1]["picture"] for turns in varied} == {"c", "c#1", "c#2", "c#3"}


def test_versions_of_a_picture_do_not_depend_on_what_is_beside_it() -> None:
    pixels = torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def versions(numbers: list[int], variant: int) -> torch.Tensor:
        keys = [variant_key(f"cat__{'abcde'[number]}", variant) for number in numbers]
        return augment_versions(pixels[numbers], keys)

    whole = versions([0, 1, 2, 3, 4], 1)
    # Sums of one picture may be taken in another order than those of five.
    torch.testing.assert_close(versions([3, 0, 4], 1), whole[[3, 0, 4]])
    other = versions([0, 1, 2, 3, 4], 2)
    assert all(not torch.allclose(one, two) for one, two in zip(whole, other, strict=True))


def test_same_picture_under_another_key_looks_different() -> None:
    pixels = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    same = augment_versions(pixels, [variant_key(f"cat__{style}", 1) for style in "abcd"])
    assert all(not torch.allclose(same[0], changed) for changed in same[1:])
