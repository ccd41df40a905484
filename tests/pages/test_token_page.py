"""The token page in a real browser: known numbers, switches, keys, the slider, hard texts, both themes, a phone, its size."""

from __future__ import annotations

import copy
import random

import pytest

from tsdkd.reporting.token_page import token_page

HARD = [" a", "\n", "<script>alert(1)</script>", "⟨F0 9F⟩", "😀", "שלום", "\u202e", "&amp;", "</script>", "\t", "é", "x"]


def view(n=12, k=4, seed=0, tokens=None, label="s, TSD-KD", vocabulary=40):
    """A table of made-up numbers, of which the first tokens' are known."""
    draw = random.Random(seed)
    tokens = tokens or [HARD[t % len(HARD)] for t in range(n)]
    ids = [[(7 * t + i) % vocabulary for i in range(k)] for t in range(n)]
    ranks = [draw.sample(range(k), k) for _ in range(n)]
    probabilities = [sorted((draw.random() / k for _ in range(k)), reverse=True) for _ in range(n)]
    columns = {
        "student_entropy": [round(0.1 * (t % 11), 7) for t in range(n)],
        "teacher_entropy": [None if t == 3 else draw.random() for t in range(n)],
        "divergence": [draw.random() for _ in range(n)],
        "student_log_prob": [-draw.random() for _ in range(n)],
        "teacher_log_prob": [-draw.random() for _ in range(n)],
        "contribution/indirect": [1.25 if t < 3 else 0.0 for t in range(n)],
        "takes/indirect": [int(t < 3) for t in range(n)],
        "contribution/direct": [0.5 / n for _ in range(n)],
        "gate/direct": [draw.random() for _ in range(n)],
        "takes/entropy": [int(t in (4, 5)) for t in range(n)],
    }
    return {
        "token_ids": [ids[t][1] if t != 2 else vocabulary for t in range(n)],
        "tokens": tokens,
        "columns": columns,
        "candidates": {
            "ids": ids,
            "texts": {str(i): f"c{i}" for i in range(vocabulary)},
            "student": probabilities,
            "teacher": probabilities,
            "teacher_ranks": ranks,
            "teacher_best": [ids[t][0] if t != 5 else vocabulary - 1 for t in range(n)],
            "teacher_best_prob": [0.5] * n,
        },
        "terms": {
            "indirect": {"kind": "ranking", "weight": 0.1, "value": 37.5},
            "direct": {"kind": "divergence", "weight": 1.0, "value": 0.5},
            "entropy": {"kind": "entropy", "weight": 1.0, "value": 0.0},
        },
        "loss": 4.25,
        "prompt": "How <b>many</b>?",
        "method": "TSD-KD",
        "student": "s",
        "teacher": "t",
        "temperature": 1.0,
        "note": "",
        "label": label,
        "meanings": {name: (f"meaning of {name}", "nats") for name in [*columns, "log_ratio"]},
    }


def figure(page, column):
    return page.locator(f"#panel tr[data-column='{column}'] td.number").first.inner_text()


def test_a_tokens_panel_shows_its_known_numbers_by_pointer_and_by_click(opened):
    table = view()
    page = opened(token_page([[table]]))
    tokens = page.locator(".token")
    assert tokens.count() == 12
    tokens.nth(4).hover()
    assert figure(page, "student_entropy") == "0.4" and figure(page, "contribution/direct") == "0.0416667"
    assert figure(page, "takes/entropy") == "yes" and figure(page, "takes/indirect") == "no"
    tokens.nth(3).click()
    assert figure(page, "teacher_entropy") == "–" and "token 3, id 22" in page.locator("#panel h2").inner_text()
    lines = page.locator("#panel svg.candidates line")
    pairs = [(int(lines.nth(i).get_attribute("data-from")), int(lines.nth(i).get_attribute("data-to"))) for i in range(4)]
    assert pairs == list(enumerate(table["candidates"]["teacher_ranks"][3]))
    tokens.nth(2).hover()
    assert "not among the candidates" in page.locator("#panel .written").inner_text()
    tokens.nth(5).hover()
    assert "The teacher's own best, c39, 50.0 %" in page.locator("#panel").inner_text()


def test_the_opener_is_shaded_and_uncertain_tokens_are_underlined(opened):
    page = opened(token_page([[view()]]))
    assert page.locator(".opener .token").count() == 3
    tops = page.locator(".token.top")
    assert [tops.nth(i).get_attribute("data-t") for i in range(tops.count())] == ["4", "5"]
    assert "indirect term (opener): 3 of 12 tokens" in page.locator(".keys").inner_text()
    assert "loss 4.25 = 0.1 × indirect 37.5" in page.locator("#views").inner_text()


def test_keys_alone_move_over_the_tokens_and_the_switches(opened):
    page = opened(token_page([[view()], [view(n=5, seed=1)]]))
    for _ in range(8):  # to the text
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
    else:
        raise AssertionError("no token is reached by Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 2," in page.locator("#panel h2").inner_text()
    page.keyboard.press("End")
    assert "token 11," in page.locator("#panel h2").inner_text()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert "token 0," in page.locator("#panel h2").inner_text()
    page.locator("#which").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".token").count() == 5


def test_the_slider_counts_and_dims(opened):
    page = opened(token_page([[view(n=11)]]))  # entropies 0, 0.1, …, 1
    assert "11 of 11 tokens (100.0 %)" in page.locator("#count").inner_text()
    page.locator("#threshold").fill("650")
    assert page.locator("#count").inner_text().startswith("≥ 0.65: 4 of 11 tokens (36.4 %)")
    assert page.locator(".token.off").count() == 7
    page.locator("#quantity").select_option("teacher_entropy")
    assert "10 of 11 tokens" in page.locator("#count").inner_text() and page.locator(".token.off").count() == 0


def test_the_strip_and_the_list_lead_to_their_tokens(opened):
    page = opened(token_page([[view()]]))
    box = page.locator("svg.strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.97, box["y"] + box["height"] / 2)
    assert "token 11," in page.locator("#panel h2").inner_text()
    first = page.locator("#most li").first
    assert "token 0: 1.29167, 30.4 %" in first.inner_text()
    first.locator("button").click()
    assert "token 0," in page.locator("#panel h2").inner_text()


def test_hard_texts_are_seen_and_run_nothing(opened):
    page = opened(token_page([[view()]]))
    texts = page.locator(".token").all_text_contents()
    assert texts == ["·a", "↵\n", HARD[2], "⟨F0 9F⟩", "😀", "שלום", "⟨U+202E⟩", "&amp;", "</script>", "⇥", "é", "x"]
    assert page.locator("script").count() == 2 and page.locator("b").count() == 3  # of the page's own explanation
    assert page.evaluate("document.querySelector('#prompt pre').textContent") == "How <b>many</b>?"
    shown = page.locator("#views details pre").first.text_content()
    assert shown == "".join(HARD)


def test_two_views_stand_side_by_side_on_the_same_text(opened):
    other = copy.deepcopy(view())
    other["label"], other["columns"]["student_entropy"][4] = "s2, GKD", 0.9
    page = opened(token_page([[view(), other]]))
    assert page.locator("#views section").count() == 2
    page.locator("section").nth(1).locator(".token").nth(4).hover()
    cells = page.locator("#panel tr[data-column='student_entropy'] td.number")
    assert cells.all_inner_texts() == ["0.4", "0.9"] and page.locator(".token[aria-current]").count() == 2
    assert "|" in page.locator("#count").inner_text()
    other["token_ids"][0] += 1
    with pytest.raises(ValueError, match="completion 0 has tables of different tokens side by side"):
        token_page([[view(), other]])
    with pytest.raises(ValueError, match="no completion to show"):
        token_page([])


@pytest.mark.parametrize("scheme,paper", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 27)")])
def test_both_themes_and_a_phone(opened, scheme, paper):
    page = opened(token_page([[view(n=60)]]), width=390, height=800, scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".token").nth(7).tap() if page.evaluate("'ontouchstart' in window") else page.locator(".token").nth(7).click()
    assert "token 7," in page.locator("#panel h2").inner_text()


def test_eight_completions_of_512_tokens_stay_under_2_mb(opened, record_property, capsys):
    """The times are measured and printed, not asserted."""
    vocabulary, many = 151_000, []
    for seed in range(8):
        made = view(n=512, k=10, seed=seed, vocabulary=vocabulary)
        draw = random.Random(seed)
        ids = [draw.sample(range(vocabulary), 10) for _ in range(512)]
        probabilities = [[f"{draw.random() ** 8:.7g}" for _ in range(10)] for _ in range(512)]
        made["candidates"] |= {
            "ids": ids,
            "texts": {str(i): f" token{i % 997}" for row in ids for i in row},
            "student": [[float(p) for p in row] for row in probabilities],
            "teacher": [[float(p) for p in row[::-1]] for row in probabilities],
            "teacher_ranks": [draw.sample(range(10), 10) for _ in range(512)],
        }
        many.append([made])
    html = token_page(many)
    assert len(html.encode()) < 2e6
    page = opened(html)
    while not page.evaluate("performance.getEntriesByName('first-paint').length"):
        page.wait_for_timeout(10)
    paint = page.evaluate("performance.getEntriesByName('first-paint')[0].startTime")
    page.locator("#quantity").select_option("log_ratio")
    switch = float(page.evaluate("document.body.dataset.switched"))
    page.locator("#which").select_option("3")
    other = float(page.evaluate("document.body.dataset.switched"))
    with capsys.disabled():
        print(f"\ntoken page of 8 × 512 tokens, {len(html.encode()) / 1e6:.2f} MB: first paint {paint:.0f} ms, "
              f"another quantity {switch:.0f} ms, another completion {other:.0f} ms")  # fmt: skip
    assert page.locator(".token").count() == 512


def test_each_view_says_its_temperature_and_either_ones_columns_can_be_chosen(opened):
    first, second = view(), view()
    for name in ("gate/direct", "contribution/indirect", "takes/indirect"):
        del first["columns"][name]
    second["temperature"] = 2.0
    page = opened(token_page([[first, second]]))
    assert page.locator("#views section").nth(1).inner_text().count("τ = 2") == 1
    assert "τ = 2" not in page.locator("#views section").nth(0).inner_text()
    page.locator("#quantity").select_option("gate/direct")
    assert page.locator("#count").inner_text().endswith("| 12 of 12 tokens (100.0 %)")


def test_a_gate_above_1_and_a_ranking_that_is_no_prefix_stay_in_the_strip(opened):
    table = view()
    table["columns"]["gate/direct"][3] = 7.5
    table["columns"]["takes/indirect"] = [int(t % 3 == 0) for t in range(12)]
    page = opened(token_page([[table]]))
    assert "gate, 0 to 7.5" in page.locator(".keys").inner_text() and page.locator("svg.strip rect").count() == 4
    heights = page.locator("svg.strip path").evaluate_all("ps => ps.map(p => p.getBBox().y)")
    assert min(heights) >= 0 and "4 of 12 tokens" in page.locator(".keys").inner_text()
    one = opened(token_page([[view(n=1, tokens=["x"])]]))
    assert one.locator("svg.strip circle").count() == 2


def test_the_slider_at_its_end_keeps_the_highest(opened):
    table = view()
    table["columns"]["teacher_log_prob"] = [-2.0423671, *[-3.0173 - t for t in range(11)]]
    page = opened(token_page([[table]]))
    page.locator("#quantity").select_option("teacher_log_prob")
    page.locator("#threshold").fill("1000")
    assert "1 of 12 tokens" in page.locator("#count").inner_text()


def test_blank_and_invisible_characters_are_seen(opened):
    tokens = ["\u00a0", "\u3000", "\ufe0f", "\U000e0041", "\u0301", "⟨x\u202ey⟩", "a\u0301", "z"]
    texts = opened(token_page([[view(n=8, tokens=tokens)]])).locator(".token").all_text_contents()
    assert texts == ["⟨U+00A0⟩", "⟨U+3000⟩", "⟨U+FE0F⟩", "⟨U+E0041⟩", "◌\u0301", "⟨x⟨U+202E⟩y⟩", "a\u0301", "z"]


def test_the_phones_panel_opens_by_a_touch_and_closes(opened):
    page = opened(token_page([[view()]]), width=390, height=800)
    assert not page.locator("#panel").is_visible()
    page.locator(".token").nth(3).click()
    assert page.locator("#panel").is_visible()
    page.locator("#panel .close").click()
    assert not page.locator("#panel").is_visible()


def test_the_panel_rounds_no_number_coarser_than_the_data(opened):
    table = view()
    table["columns"]["student_entropy"][4] = 1.2345678
    page = opened(token_page([[table]]))
    page.locator(".token").nth(4).hover()
    assert figure(page, "student_entropy") == "1.2345678"
