"""The playground in a real browser, in front of the real HTTP API and of replicas that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

import pipelines.serve
from mmicl_core.bank import Demonstration
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import DataError
from pipelines.serve.errors import DeadlineError, OverloadedError
from pipelines.serve.keys import add_key
from pipelines.serve.openai_api import build_api
from pipelines.serve.page import page_router
from pipelines.serve.services import Services
from tests.browser import PHONE, SCREEN, chromium, too_wide
from tests.playground import Playground, cut_words, low_contrast, nameless, opened, overlaps, too_small
from tests.served import AIM, BASE, FakeGenerator, make_services, png, served

# It runs where it is taken for markup, closes what it may stand in, and asks an address.
HOSTILE = (
    "<script>document.title='run'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='run'\">"
    "'\" onmouseover=document.title='run' x='</style></svg></title>--><svg onload=document.title='run'>"
)
SHOWN = ((png(10), "bako"), (png(200), "mute"))
TITLE = "mmicl playground"

Serve = Callable[..., AbstractContextManager["Server"]]


@dataclass(frozen=True)
class Server:
    """Where it is, and what stands behind it."""

    url: str
    services: Services

    @property
    def generator(self) -> Any:
        return self.services.generator

    @property
    def compressor(self) -> Any:
        return self.services.compressor


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """A server with the page of `told`, a configuration, or of its own."""

    @contextmanager
    def start(generator: Any = None, told: Any = None, **settings: Any) -> Iterator[Server]:
        services = make_services(tmp_path, generator=generator, **settings)
        page = page_router(services.config if told is None else told)
        with served(build_api(services, [page])) as url:
            yield Server(url, services)

    return start


@contextmanager
def ready(browser: Browser, server: Server, size: tuple[int, int] = SCREEN) -> Iterator[Playground]:
    """A page on which a pack was made of `SHOWN`."""
    with opened(browser, server.url, size) as page:
        page.show(*SHOWN)
        page.make()
        yield page


def asked_for(page: Playground) -> set[str]:
    """Hosts that the page asked."""
    return {address.split("/")[2] for address in page.seen.requests if address.startswith("http")}


def test_pack_of_dropped_pictures_holds_them_as_they_are_under_their_names(browser, serve):
    with serve() as server, opened(browser, server.url) as page:
        page.show(*SHOWN)
        told = page.make()
        ((call, model, _, demonstrations),) = server.compressor.asked
        assert (call, model) == ("register", "nano@aim")
        assert demonstrations == tuple(Demonstration((one,), "This is", name) for one, name in SHOWN)
        (entry,) = server.services.bank.packs("public")
        full, fused = sum(entry.tokens_full), sum(entry.tokens_fused)
        assert " ".join(told.split()) == f"Pack made: 2 demonstrations {full} \u2192 {fused} tokens"
        assert page.seen.errors == []
        assert asked_for(page) == {page.url.removeprefix("http://")}


def test_demonstrations_are_asked_what_is_written_beside_them(browser, serve):
    with serve() as server, opened(browser, server.url) as page:
        page.show(*SHOWN)
        page.page.get_by_label("Question asked of every picture").fill("What is it?")
        page.page.get_by_label("Ask some pictures another question").check()
        page.page.get_by_label("Question about picture 2").fill("And this?")
        page.make()
        ((*_, demonstrations),) = server.compressor.asked
        assert [one.question for one in demonstrations] == ["What is it?", "And this?"]
        assert page.page.get_by_label("Question", exact=True).input_value() == "What is it?"


def test_question_is_answered_with_the_pack_and_with_all_demonstrations_written_out(browser, serve):
    with serve() as server, ready(browser, server) as page:
        page.ask(png(90), "Which?")
        assert page.answer("pack") == page.answer("full") == "bako mute"
        with_pack, written_out = server.generator.questions
        (entry,) = server.services.bank.packs("public")
        assert (with_pack.fusion.fused.pack_id, len(with_pack.turns)) == (entry.id, 1)
        assert written_out.fusion is None
        assert [(turn.question, turn.answer) for turn in written_out.turns] == [
            ("This is", "bako"),
            ("This is", "mute"),
            ("Which?", None),
        ]
        sent = [written_out.pictures[key] for turn in written_out.turns for key in turn.pictures]
        assert sent == [*(one for one, _ in SHOWN), png(90)]
        assert page.seen.errors == []
        assert asked_for(page) == {page.url.removeprefix("http://")}


def test_comparison_shows_the_numbers_of_the_server_and_the_wait_until_the_first_text(browser, serve):
    slow = FakeGenerator(pieces=("one",) * 4, begin=0.05, seconds=0.2)
    with serve(slow) as server, ready(browser, server) as page:
        page.ask(png(90))
        (entry,) = server.services.bank.packs("public")
        full, fused = sum(entry.tokens_full), sum(entry.tokens_fused)
        written = sum(16 + 4 for _ in SHOWN)
        bars = page.bars()
        assert bars["Demonstrations"] == (f"{fused} tokens", f"{written} tokens")
        assert bars["Whole prompt"] == (f"{30 + fused} tokens", f"{30 + written} tokens")
        assert bars["First token, server"] == ("13 ms", "13 ms")
        for told in bars["First token, here"]:
            # Later than the first piece, sooner than the last.
            assert 250 <= int(told.removesuffix(" ms")) < 850
        assert page.facts("pack")["Already read"] == "7 tokens"
        assert page.facts("full")["Answer"] == "4 tokens"
        assert f"7 of {30 + written} tokens were kept" in page.page.inner_text("#kept")
        assert f"{written / fused:.1f} times fewer tokens" in page.page.inner_text("#verdict")
        width = page.page.evaluate("""[...document.querySelector('#bars li').querySelectorAll('.bar')]
            .map(bar => bar.getBoundingClientRect().width)""")
        assert width[0] / width[1] == pytest.approx(fused / written, abs=0.02)
        assert full > fused


def test_answer_appears_piece_by_piece_and_is_told_to_screen_readers(browser, serve):
    with serve(FakeGenerator(("ba", "ko", " mute"), seconds=0.15)) as server, ready(browser, server) as page:
        page.page.evaluate("""() => {
          const text = document.querySelector('#pack-answer .text')
          window.grown = []
          new MutationObserver(() => grown.push(text.textContent)).observe(text, {childList: true})
        }""")
        page.ask(png(90))
        assert page.page.evaluate("[...new Set(grown)]") == ["ba", "bako", "bako mute"]
        assert page.page.locator("#pack-answer .text").get_attribute("aria-live") == "polite"


def test_pack_is_made_and_asked_with_the_keyboard_alone(browser, serve, tmp_path):
    files = [tmp_path / f"{name}.png" for _, name in SHOWN]
    for file, (picture, _) in zip(files, SHOWN, strict=True):
        file.write_bytes(picture)
    with serve() as server, opened(browser, server.url) as page:
        keys = page.page.keyboard
        expect(page.page.get_by_label("Model")).to_have_value("nano@aim")
        page.tab_to("demonstration-files")
        with page.page.expect_file_chooser() as chooser:
            keys.press("Enter")
        chooser.value.set_files(files)
        for place, (_, name) in enumerate(SHOWN, start=1):
            expect(page.page.get_by_label(f"Name of picture {place}")).to_be_focused()
            keys.type(name)
            # Leads to the next picture without a name, and makes the pack after the last.
            keys.press("Enter")
        expect(page.page.locator("#made p")).to_be_visible()
        page.tab_to("query-file")
        with page.page.expect_file_chooser() as chooser:
            keys.press("Enter")
        chooser.value.set_files(files[0])
        expect(page.page.get_by_label("Question", exact=True)).to_be_focused()
        keys.press("Enter")
        expect(page.page.locator("#verdict")).to_be_visible()
        assert page.answer("full") == "bako mute"
        assert server.compressor.asked[0][-1] == tuple(
            Demonstration((one,), "This is", name) for one, name in SHOWN
        )
        page.tab_to("import")


def test_escape_stops_the_answer_and_asks_no_further(browser, serve):
    slow = FakeGenerator(("one ",) * 200, seconds=0.05)
    with serve(slow) as server, ready(browser, server) as page:
        page.drop("#drop-query", png(90))
        question = page.page.get_by_label("Question", exact=True)
        question.press("Enter")
        expect(page.page.locator("#pack-answer .text")).to_contain_text("one one")
        question.press("Escape")
        expect(page.page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
        assert page.page.inner_text("#pack-answer .state") == "Stopped"
        assert page.answer("pack").startswith("one one")
        page.page.wait_for_timeout(300)
        assert (len(slow.questions), slow.cancelled) == (1, 1)
        assert page.page.locator("#comparison").is_hidden()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OverloadedError("too many questions wait", 3),
            "Refused (429): too many questions wait. Try again in 3 seconds.",
        ),
        (DeadlineError("it came too late"), "Refused (504): "),
        (DataError("the picture cannot be read"), "Refused (400): the picture cannot be read"),
    ],
)
def test_answer_that_is_refused_says_why_in_its_place_and_the_other_one_comes(browser, serve, error, told):
    with serve(FakeGenerator(errors=[error])) as server, ready(browser, server) as page:
        page.ask(png(90))
        assert page.error("#pack-answer .error").startswith(told)
        assert page.answer("full") == "bako mute"
        page.ask(png(90))
        assert page.page.locator("#pack-answer .error").is_hidden()
        assert page.answer("pack") == "bako mute"


def test_answer_that_breaks_off_keeps_its_beginning_and_says_why(browser, serve):
    broken = FakeGenerator(break_off=DataError("the replica was lost"))
    with serve(broken) as server, ready(browser, server) as page:
        page.ask(png(90))
        assert page.error("#pack-answer .error") == "the replica was lost"
        assert page.answer("pack") == "bako mute"
        assert page.page.locator("#comparison").is_hidden()


def test_pack_that_is_refused_says_why_below_its_pictures(browser, serve):
    # The page is told more than the server takes.
    small = serve(told=ServeConfig(), max_image_bytes=1024, max_images=1)
    with small as server, opened(browser, server.url) as page:
        page.show((png() + bytes(1_200_000), "bako"))
        page.page.get_by_role("button", name="Make a pack").click()
        assert page.error("#show-error").startswith("Refused (413): ")


def test_pack_that_is_gone_and_a_server_that_is_gone_are_told_where_it_happened(browser, serve):
    with serve() as server, ready(browser, server) as page:
        (entry,) = server.services.bank.packs("public")
        server.services.bank.delete("public", entry.id)
        page.ask(png(90))
        assert page.error("#pack-answer .error").startswith("Refused (404): ")
        page.seen.context.set_offline(True)
        page.page.get_by_role("button", name="Make a pack").click()
        assert page.error("#show-error").startswith("The connection broke")


def test_what_is_no_picture_or_too_large_is_refused_by_name_before_it_is_sent(browser, serve):
    with serve(max_image_bytes=1024, max_images=2) as server, opened(browser, server.url) as page:
        expect(page.page.locator("#limit")).to_contain_text("up to 1 KiB each and 2 pictures")
        large = png(4) + bytes(1024)
        files = [png(1), b"<svg/>", b"words", large, b"\x89PNG damaged", png(2), png(3)]
        names = ["good.png", "drawn.svg", "words.txt", "large.png", "damaged.png", "b.png", "c.png"]
        page.drop("#drop-demonstrations", *files, names=names)
        told = page.error("#show-error")
        assert "drawn.svg is not a picture of a kind that is read" in told
        assert "words.txt is not a picture of a kind that is read" in told
        assert "large.png has 2 KiB; this server takes pictures of up to 1 KiB" in told
        assert "damaged.png is damaged" in told
        assert "1 left out" in told
        assert page.page.locator("#demonstrations li").count() == 2
        page.page.get_by_role("button", name="Make a pack").click()
        assert page.error("#show-error").startswith("Give every picture a name")
        expect(page.page.get_by_label("Name of picture 1")).to_be_focused()
        assert server.compressor.asked == []


def test_question_without_a_pack_or_a_picture_says_what_is_missing(browser, serve):
    with serve() as server, opened(browser, server.url) as page:
        page.page.get_by_role("button", name="Ask", exact=True).click()
        assert page.error("#ask-error").startswith("Make a pack first")
        page.show(*SHOWN)
        page.make()
        page.page.get_by_role("button", name="Ask", exact=True).click()
        assert page.error("#ask-error") == "Choose a picture to ask about."
        assert server.generator.questions == []


def test_hostile_names_questions_files_and_answers_are_text(browser, serve):
    with serve(FakeGenerator((HOSTILE[:50], HOSTILE[50:]))) as server, opened(browser, server.url) as page:
        page.show(*((one, HOSTILE) for one, _ in SHOWN), names=[f"{HOSTILE}{n}.png" for n in range(2)])
        page.page.get_by_label("Question asked of every picture").fill(HOSTILE)
        page.drop("#drop-demonstrations", b"<svg/>", names=[f"{HOSTILE}.svg"])
        # A slash ends the folder of a file name.
        assert HOSTILE.rpartition("/")[2] in page.error("#show-error").replace(":", "/")
        page.make()
        page.ask(png(90), HOSTILE)
        assert page.answer("pack") == page.answer("full") == HOSTILE
        for box in page.page.locator("img, button, input").all():
            if box.is_visible():
                box.hover()
        assert server.generator.questions[1].turns[0].answer == HOSTILE
        assert page.page.title() == TITLE
        assert page.seen.errors == []
        assert asked_for(page) == {page.url.removeprefix("http://")}


def test_key_is_asked_for_tried_again_and_kept_for_the_tab_alone(browser, serve, tmp_path):
    key = add_key(tmp_path / "keys", "reader")
    with serve(keys=str(tmp_path / "keys")) as server, opened(browser, server.url) as page:
        field = page.page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.page.locator("#key-why")).to_contain_text("refuses this key")
        expect(field).to_have_value("")
        field.fill(key)
        field.press("Enter")
        # What the key was missing for goes on by itself.
        expect(page.page.get_by_label("Model")).to_have_value("nano@aim")
        expect(field).to_be_hidden()
        page.show(*SHOWN)
        page.make()
        assert server.compressor.asked[0][2] == "reader"
        kept = page.page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
        assert kept == [[key], 0, ""]
        assert key not in page.page.content()
        other = page.seen.context.new_page()
        other.goto(page.url)
        expect(other.get_by_label("API key")).to_be_focused()
        page.page.get_by_role("button", name="Forget the key").click()
        expect(page.page.get_by_label("API key")).to_be_focused()
        assert page.page.evaluate("sessionStorage.length") == 0


def test_key_that_is_not_given_leaves_the_reason_in_its_place(browser, serve, tmp_path):
    add_key(tmp_path / "keys", "reader")
    with serve(keys=str(tmp_path / "keys")) as server, opened(browser, server.url) as page:
        expect(page.page.get_by_label("API key")).to_be_focused()
        page.page.keyboard.press("Escape")
        assert page.error("#server-error").startswith("Refused (401): ")


def test_packs_are_exported_deleted_imported_and_used(browser, serve, tmp_path):
    with serve() as server, ready(browser, server) as page:
        (entry,) = server.services.bank.packs("public")
        with page.page.expect_download() as download:
            page.page.get_by_role("button", name="Export").click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        assert file.name == f"{entry.id}.safetensors"
        page.page.get_by_role("button", name="Delete").click()
        assert server.services.bank.packs("public") == [entry]
        page.page.get_by_role("button", name="Really delete").click()
        expect(page.page.locator("#no-packs")).to_be_visible()
        assert server.services.bank.packs("public") == []
        page.page.locator("#import").set_input_files(file)
        expect(page.page.locator("#packs button[aria-pressed=true]")).to_have_text("In use")
        assert [one.id for one in server.services.bank.packs("public")] == [entry.id]
        page.ask(png(90))
        assert page.answer("pack") == "bako mute"
        assert page.error("#full-answer .error").startswith("The pictures of this pack are not on this page")
        assert page.seen.errors == []
        page.page.reload()
        page.page.get_by_role("button", name="Use", exact=False).first.click()
        expect(page.page.locator("#asked-of")).to_contain_text("nano@aim")


def test_file_that_is_no_pack_is_refused_beside_the_packs(browser, serve, tmp_path):
    file = tmp_path / "none.safetensors"
    file.write_bytes(b"no pack")
    with serve() as server, opened(browser, server.url) as page:
        page.page.locator("#import").set_input_files(file)
        assert page.error("#packs-error").startswith("Refused (4")
        assert server.services.bank.packs("public") == []


def test_packs_are_made_by_the_model_that_is_chosen_among_those_that_can(browser, serve):
    other = replace(AIM, id="nano@other", maker={**AIM.maker, "adapter": "c" * 64})
    with serve(FakeGenerator(models=(BASE, AIM, other))) as server, opened(browser, server.url) as page:
        choice = page.page.get_by_label("Model")
        expect(choice).to_have_value("nano@aim")
        assert [one.is_disabled() for one in choice.locator("option").all()] == [True, False, False]
        choice.select_option("nano@other")
        page.show(*SHOWN)
        page.make()
        assert server.compressor.asked[0][1] == "nano@other"


def test_server_without_a_model_that_fuses_says_so(browser, serve):
    with serve(FakeGenerator(models=(BASE,))) as server, opened(browser, server.url) as page:
        assert page.error("#server-error").startswith("No model of this server makes packs")


def test_examples_make_a_pack_with_two_presses_and_can_be_asked_about(browser, serve):
    folder = Path(pipelines.serve.__file__).parent / "playground"
    with serve() as server, opened(browser, server.url) as page:
        page.page.get_by_role("button", name="Try with examples").click()
        make = page.page.get_by_role("button", name="Make a pack")
        expect(make).to_be_focused()
        make.press("Enter")
        expect(page.page.locator("#made p")).to_be_visible()
        ((*_, demonstrations),) = server.compressor.asked
        assert [one.answer for one in demonstrations] == ["bako", "mute"] * 4
        bundled = {path.read_bytes() for path in folder.glob("*.webp")}
        assert len({one.images[0] for one in demonstrations}) == 8
        assert {one.images[0] for one in demonstrations} <= bundled
        page.page.get_by_role("button", name="Ask about the spider").click()
        page.page.get_by_label("Question", exact=True).press("Enter")
        expect(page.page.locator("#verdict")).to_be_visible()
        (asked,) = server.generator.questions[0].pictures.values()
        assert asked == (folder / "spider-fluent-3d.webp").read_bytes()
        assert page.seen.errors == []


@pytest.mark.parametrize("size", [SCREEN, PHONE, (1600, 900)])
def test_page_is_drawn_whole_and_legible_whatever_is_on_it(browser, serve, size):
    # Answers and names of one word longer than a line.
    long = FakeGenerator(("bako", "x" * 200))
    with serve(long) as server, opened(browser, server.url, size) as page:
        looked_at = []
        for scheme in ("light", "dark"):
            page.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            looked_at += [*overlaps(page.page), *cut_words(page.page), *low_contrast(page.page)]
        page.show(*SHOWN, (png(30), "x" * 200))
        page.page.get_by_label("Ask some pictures another question").check()
        page.make()
        page.page.get_by_role("button", name="Ask", exact=True).click()
        page.error("#ask-error")
        page.ask(png(90))
        for scheme in ("light", "dark"):
            page.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            looked_at += [*overlaps(page.page), *cut_words(page.page), *low_contrast(page.page)]
        assert looked_at == []
        assert too_wide(page.page) == []


def test_things_to_press_have_names_and_keep_their_size(browser, serve):
    with serve() as server, ready(browser, server, PHONE) as page:
        assert nameless(page.page) == []
        assert too_small(page.page) == []
