"""The samples that we ship are what they say: enough of each kind, in their language, each of its own, and nothing that is scored."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from quantkit.recipe import heldout_files, shipped

LANGUAGES = ("ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh")
SIMILAR = 0.05  # Jaccard index of shingles above which two samples are one; unrelated ones reach .035
SAME_FACTS = 0.4  # the same for numbers, names in code and formulas, which a translation leaves as they are; unrelated ones reach .29
FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.DOTALL)
Line = dict[str, Any]


def read(files: list[Path]) -> list[Line]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


@pytest.fixture(scope="module")
def samples() -> list[Line]:
    return read(sorted((shipped("calibration") / "samples").glob("*.jsonl")))


@pytest.fixture(scope="module")
def heldout() -> list[Line]:
    return read(heldout_files())


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


# --- Enough -----------------------------------------------------------------------------------------------------------------------


def test_every_language_has_enough_of_both_kinds(samples):
    counts = Counter((one["language"], one["domain"]) for one in samples)
    assert set(counts) == {(language, domain) for language in LANGUAGES for domain in ("stem", "agentic")}
    for language in LANGUAGES:
        assert counts[language, "stem"] >= 16, language
        assert counts[language, "agentic"] >= 12, language


def test_agents_call_in_parallel_mend_failures_and_think(samples):
    """In each language: several calls in one message, reasoning before a call, a call repeated with other arguments."""
    for language in LANGUAGES:
        agents = [one for one in samples if (one["language"], one["domain"]) == (language, "agentic")]
        messages = [message for one in agents for message in one["messages"]]
        assert sum(len(message.get("tool_calls", [])) > 1 for message in messages) >= 3, language
        assert sum(bool(message.get("reasoning_content")) for message in messages) >= 3, language
        again = 0
        for one in agents:
            calls = [call["function"] for message in one["messages"] for call in message.get("tool_calls", [])]
            again += any(a["name"] == b["name"] and a["arguments"] != b["arguments"] for n, a in enumerate(calls) for b in calls[n + 1 :])
        assert again >= 3, language


# --- Length -----------------------------------------------------------------------------------------------------------------------


def tokens_of(one: Line) -> float:
    """About how many tokens a large multilingual vocabulary makes of a sample: the rates of one with 262,144 entries, rounded."""
    text = "".join(strings([one["messages"], one["tools"]]))
    dense = len(re.findall("[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]", text))
    indic = len(re.findall("[\u0600-\u06ff\u0900-\u097f]", text))
    return dense * 0.65 + indic * 0.38 + (len(text) - dense - indic) * 0.30


def test_samples_are_neither_scraps_nor_books(samples):
    """150 to 1,200 tokens, with room for what another vocabulary makes of it."""
    for one in samples:
        assert 130 <= tokens_of(one) <= 1400, f"{one['id']}: about {tokens_of(one):.0f} tokens"


# --- Language ---------------------------------------------------------------------------------------------------------------------

# Words that carry grammar, not subjects; none of them is frequent in another language of the same script.
STOP_WORDS = {
    "en": "the and of is that with are you it not from this have which at be was on what i we each your an so if to by",
    "nl": "het een van dat niet met zijn voor aan ook als maar wordt bij dan naar uit je ik hoeveel wat er nog deze geen dus moet om te",
    "fr": (
        "les des une est dans pour que qui sur pas avec au par ce plus je vous nous il sont cette ou et du aux leur "
        "donc très sans l d qu n s c j si mais entre ces son ses"
    ),
    "es": "el los las una es por con para del se al lo más como pero su y en cada cuánto qué hay entre sin esta este son muy también",
    "ru": (
        "и в не на что с это по как для из к но мы вы если при уже или за от так то же у его бы все а мне нас вас ещё "
        "есть нет чтобы сколько где там этот эта который которые только после до под без между через раз нам надо"
    ),
    "hi": "है के में की का को से और पर हैं कि यह नहीं तो भी एक ने हो या इस लिए कर था ही",
    "ar": (
        "في من على إلى أن هل ما هذا هذه عن مع لا ثم كل التي الذي بين كم أو لم قد هو هي كان إذا بعد حتى لكن كيف أي عند "
        "إن ذلك تلك لها له به بها فيه وفي ومن فإن وقد أما بل كما لأن أنا نحن وهو وهي يجب مثل أكثر عليه"
    ),
}
NEIGHBOURS = {  # of the same script, not shipped: what a sample must not be mistaken for
    "de": "der die das und ist nicht mit den von ein eine für auf dem sich auch wird bei aus wie nach oder sind ich wir man zu",
    "pt": "o os as uma não com para do da que por em no na mais como são você mas seu dos das ao pela também isso está",
    "it": "il di che non per una con sono gli del della si le più come nel alla questo anche ho ma ogni quanti è da dei",
    "uk": "і в не на що з це як для із але ми ви якщо при вже або за від так то є у його та й",
    "fa": "در از به که این است را با برای آن می یک هم تا شود یا اگر چه هر خود",
    "mr": "आहे आणि च्या मध्ये हे ते नाही होते साठी एक या तर पण की केला असे काय",
}
LETTERS = {
    "latin": "a-zà-ÿœ",
    "cyrillic": "а-яёіїєґ",
    "devanagari": "ऀ-ॿ",
    "arabic": "ء-ۿ",
    "kana": "ぁ-ヿ",
    "han": "一-鿿",
    "hangul": "가-힣",
}
SCRIPT = {"ru": "cyrillic", "uk": "cyrillic", "hi": "devanagari", "mr": "devanagari", "ar": "arabic", "fa": "arabic"}


def prose(one: Line, roles: tuple[str, ...] = ("user", "assistant")) -> str:
    """What people read: no code, formulas, addresses, names of tools; longest first, for code may hold dollars."""
    text = "\n".join(message["content"] for message in one["messages"] if message["role"] in roles)
    for pattern in (r"```.*?```", r"`[^`\n]*`", r"\$\$.*?\$\$", r"\$[^$\n]*\$", r"\\\[.*?\\\]", r"\\\(.*?\\\)", r"\S*[/_@]\S*"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return text.lower()


def language_of(text: str) -> str:
    """By script first, then by the share of words that are a language's stop words. Knows nothing of labels."""
    counts = {name: len(re.findall(f"[{letters}]", text)) for name, letters in LETTERS.items()}
    if counts["kana"] > 0.15 * (counts["kana"] + counts["han"]) and counts["kana"] > 0.2 * counts["latin"]:
        return "ja"
    script = max(counts, key=lambda name: counts[name] * (2.5 if name in ("han", "hangul") else 1))  # a syllable or a word each
    if script in ("han", "hangul"):
        return {"han": "zh", "hangul": "ko"}[script]
    words = Counter(re.findall(f"[{LETTERS[script]}]+", text))
    known = {**STOP_WORDS, **NEIGHBOURS}
    scores = {
        language: sum(words[word] for word in known[language].split()) / max(words.total(), 1)
        for language in known
        if SCRIPT.get(language, "latin") == script
    }
    best, second = sorted(scores, key=lambda language: -scores[language])[:2]
    least = 0.05 if script == "latin" else 0.03
    return (
        best
        if scores[best] > least and scores[best] > 1.25 * scores[second]
        else f"{best} ({scores[best]:.3f}) or {second} ({scores[second]:.3f})"
    )


def test_every_sample_is_in_its_language(samples, heldout):
    """User and assistant together, and what the user writes by itself where it is long enough to tell."""
    wrong = []
    for one in [*samples, *heldout]:
        for roles in (("user", "assistant"), ("user",), ("assistant",)):
            text = prose(one, roles)
            if len(text) > (80 if one["language"] in ("ja", "ko", "zh") else 300):
                found = language_of(text)
                wrong += [f"{one['id']} {roles}: {found}"] if found != one["language"] else []
    assert not wrong, wrong


@pytest.mark.parametrize(
    "text, language",
    [
        ("De som van de hoeken is niet gelijk aan wat je zou denken, maar dat komt door de kromming van het oppervlak.", "nl"),
        ("Die Summe der Winkel ist nicht gleich dem, was man denkt, und das liegt an der Krümmung der Fläche.", "de"),
        ("La suma de los ángulos no es igual a lo que se piensa, por la curvatura de la superficie, y hay que medirla.", "es"),
        ("A soma dos ângulos não é igual ao que se pensa, por causa da curvatura da superfície, mas isso também se mede.", "pt"),
        ("La somme des angles n'est pas égale à ce que vous pensez, et la courbure de la surface est dans les calculs.", "fr"),
        ("La somma degli angoli non è uguale a quello che si pensa, per la curvatura della superficie, come si vede.", "it"),
        ("The sum of the angles is not what you think it is, and the curvature of the surface is to blame for that.", "en"),
        ("Сумма углов не равна тому, что мы думали, и это из-за кривизны поверхности, как мы уже видели.", "ru"),
        ("Сума кутів не дорівнює тому, що ми думали, і це є наслідком кривини поверхні, як ми вже бачили.", "uk"),
        ("कोणों का योग वह नहीं है जो आप सोचते हैं, और यह सतह की वक्रता के कारण है।", "hi"),
        ("مجموع الزوايا ليس كما تظن، وهذا من انحناء السطح الذي بين النقاط، ثم إن القياس على الكرة هو ما قد يفسر هذا.", "ar"),
        ("角の和が思ったとおりにならないのは、面が曲がっているからです。", "ja"),
        ("角度之和不等于你所想的，因为曲面是弯曲的。", "zh"),
        ("각의 합이 생각과 다른 것은 곡면이 휘어 있기 때문입니다.", "ko"),
    ],
)  # fmt: skip
def test_languages_of_one_script_are_told_apart(text, language):
    assert language_of(text.lower()) == language


# --- Each of its own --------------------------------------------------------------------------------------------------------------


def shingles(one: Line, length: int = 14) -> set[str]:
    """Every run of so many characters of what is said, without spaces and case: the same for languages with and without spaces."""
    text = re.sub(r"\s+", "", "".join(strings([m["content"] for m in one["messages"]])).casefold())
    return {text[start : start + length] for start in range(max(len(text) - length + 1, 1))}


def facts(one: Line) -> set[str]:
    """What a translation leaves as it is: numbers of three or more digits, ASCII names of tools and arguments, formulas."""
    texts = list(strings([one["messages"]]))
    numbers = {n.replace(",", ".") for text in texts for n in re.findall(r"\d[\d.,]*\d", text) if sum(map(str.isdigit, n)) >= 3}
    formulas = {re.sub(r"[\s$]", "", formula) for text in texts for formula in FORMULA.findall(text) if len(formula) > 8}
    calls = {
        name
        for m in one["messages"]
        for call in m.get("tool_calls", [])
        for name in (call["function"]["name"], *call["function"]["arguments"])
    }
    return numbers | formulas | calls


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


def near_duplicates(samples: list[Line]) -> list[str]:
    """Pairs that are one sample in two dresses: much of the same text, or, told in another language, the same facts."""
    seen = [(one["id"], one["language"], shingles(one), facts(one)) for one in samples]
    found = []
    for (id_a, language_a, text_a, facts_a), (id_b, language_b, text_b, facts_b) in combinations(seen, 2):
        alike = jaccard(text_a, text_b) > SIMILAR
        retold = language_a != language_b and min(len(facts_a), len(facts_b)) >= 5 and jaccard(facts_a, facts_b) > SAME_FACTS
        if alike or retold:
            found.append(f"{id_a} and {id_b}: text {jaccard(text_a, text_b):.2f}, facts {jaccard(facts_a, facts_b):.2f}")
    return found


def test_no_two_samples_are_alike(samples, heldout):
    assert not near_duplicates([*samples, *heldout])


def test_a_planted_duplicate_is_caught(samples):
    """Every sample with the last third of each message dropped; every Latin one with all of its prose in other words."""
    retold = 0
    for one in samples:
        cut = [{**message, "content": message["content"][: len(message["content"]) * 2 // 3]} for message in one["messages"]]
        assert near_duplicates([one, {**one, "id": "cut", "messages": cut}]), f"{one['id']} cut short"
        if one["language"] in ("en", "es", "fr", "nl") and len(facts(one)) >= 5:
            foreign = {**one, "id": "retold", "language": "ko", "messages": _retold(one["messages"])}
            assert near_duplicates([one, foreign]), f"{one['id']} told in another language"
            retold += 1
    assert retold > 10


def _retold(messages: list[Line]) -> list[Line]:
    """Stands for a translation: every word of the prose is another, numbers and formulas stay."""

    def other(word: re.Match[str]) -> str:
        return "".join(chr(0xAC00 + 7 * ord(letter) % 11_000) for letter in word[0][:3])

    def swap(text: str) -> str:
        pieces = re.split(rf"({FORMULA.pattern}|\d[\d.,]*\d)", text, flags=re.DOTALL)
        return "".join(piece if number % 2 else re.sub(r"[^\W\d]+", other, piece) for number, piece in enumerate(pieces))

    return [{**message, "content": swap(message["content"])} for message in messages]


# --- Nothing that is scored -------------------------------------------------------------------------------------------------------


def passages(texts: Iterator[str], length: int) -> set[str]:
    found: set[str] = set()
    for text in texts:
        text = re.sub(r"\s+", " ", text).casefold()
        found |= {text[start : start + length] for start in range(len(text) - length + 1)}
    return found


def scored_texts() -> Iterator[str]:
    """Every string of every file under eval/, whatever its form."""
    for path in sorted(shipped("eval").rglob("*")):
        if path.suffix == ".jsonl":
            yield from strings(read([path]))
        elif path.is_file():
            yield path.read_text(encoding="utf-8")


def test_nothing_that_is_scored_stands_in_the_set(samples):
    length = 50
    scored = passages(scored_texts(), length)
    assert len(scored) > 10_000
    for one in samples:
        shared = passages(strings([one["messages"], one["tools"]]), length) & scored
        assert not shared, f"{one['id']}: {sorted(shared)[0]!r} is scored on"


def test_a_scored_item_would_be_caught(heldout):
    scored = passages(scored_texts(), 50)
    for one in heldout:
        assert passages(strings(one["messages"][-1:]), 50) & scored
