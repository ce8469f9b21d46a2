"""Answers are functions of model and prompt, and say who speaks."""

from __future__ import annotations

import math

from homegptd.sim.text import LIKELY, Speech, chat_prompt, pieces, prompt_logprobs, score, vector


def say(model: str, prompt: str, tokens: int, *, valid: bool = True) -> str:
    speech, said = Speech.after(model, prompt), []
    for _ in range(tokens):
        piece = speech.next(valid=valid)
        speech.hear(piece)
        said.append(piece)
    return "".join(said)


def test_an_answer_names_its_model_first() -> None:
    assert say("coder", "hello", 9).startswith(" This is coder: ")


def test_half_an_answer_is_continued_with_the_other_half() -> None:
    whole = say("coder", "tell me", 40)
    begun = "".join(pieces(whole)[:17])
    assert begun + say("coder", "tell me" + begun, 23) == whole


def test_models_and_prompts_answer_differently() -> None:
    answers = {say(m, p, 12) for m in ("a", "b") for p in ("x", "y")}
    assert len(answers) == 4


def test_invalid_weights_speak_garbage() -> None:
    assert "coder" not in say("coder", "hello", 20, valid=False)


def test_a_second_turn_of_a_chat_names_the_model_again() -> None:
    first = {"role": "assistant", "content": "This is coder: amber"}
    prompt = chat_prompt(
        [{"role": "user", "content": "hi"}, first, {"role": "user", "content": "so"}]
    )
    assert say("coder", prompt, 3) == " This is coder:"


def test_a_model_finds_its_own_words_likely_and_others_not() -> None:
    own = say("coder", "hello", 10)
    rows = prompt_logprobs("coder", "hello" + own, 1, valid=True)
    assert [next(iter(row.values()))["logprob"] for row in rows[1:]] == [LIKELY] * 10
    other = prompt_logprobs("chat", "hello" + own, 1, valid=True)
    assert next(iter(other[3].values()))["logprob"] < -5


def test_vectors_are_of_length_one_and_scores_follow_shared_words() -> None:
    assert math.isclose(sum(x * x for x in vector("m", "text")), 1)
    assert score("red fox", "the red fox") > score("red fox", "blue whale")
