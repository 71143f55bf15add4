"""Texts to tokenize: sentences in many scripts, code, numbers, emoji, white space, and odd code points, mixed by a
generator of our own, so that they are the same with every Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "We'll see; they've said I'd be late, but she's sure you're right. IT'S DONE, WE'RE OFF!",
    "Señor Muñoz comió jalapeños en el café «El Rincón» —¿verdad?— ¡por supuesto!",
    "Voilà l'été : à l'ombre des chênes, Noël, cœur, naïve, où l'on rêve… et « garçon ».",
    "Die Straße führt über Österreich; größer, Füße, „Anführungszeichen“, ẞ und Maßstäbe.",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy. Årsmøte på Ærø.",
    "Istanbul'da İstiklal caddesi, ılık ışık, ağaç, çiçek, şeker ve göğüs.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Українська: ґанок, їжак, єдність.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· τι κάνεις; Ἀρχὴ ἥμισυ παντός.",
    "दुनिया में सबसे अच्छा क्या है? हिन्दी में लिखा हुआ वाक्य, क्षत्रिय ज्ञान।",
    "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি। ক্ষ জ্ঞ ৎ ১২৩",
    "தமிழ் மொழி மிகவும் பழமையானது. நன்றி! ௧௨௩",
    "สวัสดีครับ วันนี้อากาศดีมาก เราไปเที่ยวกันไหม ๑๒๓",
    "السلام عليكم ورحمة الله وبركاته، كيف حالك؟ ١٢٣٤ مُحَمَّد",
    "שלום עולם, מה שלומך היום? בְּרֵאשִׁית בָּרָא",
    "今天天气很好，我们去公园散步吧。「你好」，他说：一二三四五六七八九十。",
    "吾輩は猫である。名前はまだ無い。カタカナ、ひらがな、漢字！ｶﾀｶﾅ ＡＢＣ１２３",
    "안녕하세요? 오늘은 날씨가 참 좋네요. 대한민국 ㄱㄴㄷ",
    "Xin chào, tôi là người Việt Nam; đường phố Hà Nội đông đúc, ẩm thực tuyệt vời.",
    "ሰላም ለዓለም። አማርኛ ጥሩ ቋንቋ ነው። ქართული ენა. Հայերեն լեզու։",
    "def parse(text: str, *, strict: bool = False) -> list[int]:\n    return [int(x) for x in text.split(',') if x]",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2.5f; } // TODO: don't",
    '\tif err != nil {\n\t\treturn fmt.Errorf("open %q: %w", path, err)\n\t}',
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;",
    '<div class="row"><p>Hello &amp; welcome</p><br/></div><!-- end -->',
    '{"id": 12345, "ratio": -0.5e-10, "tags": ["a", "b"], "ok": true, "none": null}',
    '#include <stdio.h>\r\nint main(void) {\r\n    printf("%d\\n", 0xFF);\r\n}\r\n',
    "$ grep -rn --include='*.py' \"TODO|FIXME\" ./src | sed -e 's/^\\s*//' > /tmp/out.txt 2>&1",
    "https://example.org/path/to/page?query=1&lang=en#section-2 user.name+tag@mail.example.com",
    "E = mc², ∑ᵢ xᵢ ≤ ∞, ∂f/∂x ≈ √2·π, ½ + ⅓, x ∈ ℝⁿ, α→β ⇒ ¬γ, 10 µm, 25 °C, №5, ™©®",
    "1234567890 3.14159 1,000,000.00 2024-02-29T23:59:59Z +1 (555) 010-9999 12:30 100% 0x1F 1e-9 Ⅳ ④ ٣",
    "👍🏽 👨‍👩‍👧‍👦 🇫🇷🇯🇵 ❤️‍🔥 🏳️‍🌈 ☕️ 🤷🏻‍♀️ 1️⃣ 😀😂🥲 ✅❌ →",
    "… — – ‒ ‘single’ “double” ‚low‘ «guillemets» 「corner」 ・ • ※ † ‡ § ¶",
    "=== Title ===\n\n* item one\n* item two\n\n---\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "e\u0301 cafe\u0301 n\u0303 Z\u0351\u036b\u0343 a\u0308\u0323 \u1100\u1161\u11a8 \u0915\u094d\u0937",
    "CamelCaseIdentifier snake_case_name kebab-case-name SCREAMING_SNAKE HTTPServer2 iPhone15Pro x86_64 utf8mb4",
)
_SPACES = (
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u2009",
    "\u200b",
    " \n",
    "\t\t",
    "",
)
_RUNS = (" ", "\t", "\n", "\r\n", "-", "=", "*", ".", "#", "_", "!", "a", "0", "ا", "的", "\u00a0", "/", "🙂", "ha")
_BLOCKS = (  # of code points, all of them assigned long ago
    *((0x21, 0x7E), (0xA1, 0x17F), (0x370, 0x377), (0x386, 0x38A), (0x391, 0x3A1), (0x400, 0x45F), (0x531, 0x556)),
    *((0x5D0, 0x5EA), (0x621, 0x63A), (0x905, 0x939), (0xE01, 0xE3A), (0x10D0, 0x10F0), (0x1E00, 0x1EF9)),
    *((0x2010, 0x2027), (0x2030, 0x205E), (0x20A0, 0x20B8), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x257F)),
    *((0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x1D400, 0x1D454)),
    *((0x1F300, 0x1F320), (0x1F600, 0x1F64F), (0x20000, 0x2A6D6), (0x300, 0x36F), (0x2E80, 0x2E99), (0xE000, 0xE010)),
)


class _Dice:
    """A generator of numbers (xorshift64*), the same everywhere."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        x = self._state
        x ^= x >> 12
        x ^= (x << 25) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 27
        self._state = x
        return ((x * 0x2545F4914F6CDD1D) & 0xFFFFFFFFFFFFFFFF) % limit if limit > 1 else 0

    def one(self, of: Sequence[T]) -> T:
        """One of them."""
        return of[self.below(len(of))]


def varied_lines(
    count: int, control_tokens: Sequence[str] = (), pieces: Sequence[str] = (), seed: int = 2024
) -> list[str]:
    """`count` texts, some of them with line breaks. `control_tokens` stand in some of them; others are `pieces`, a
    vocabulary's texts, put together at random.
    """
    dice = _Dice(seed)
    words = [word for sentence in SENTENCES for word in sentence.split(" ") if word]
    return [_line(dice, words, control_tokens, pieces) for _ in range(count)]


def _line(dice: _Dice, words: Sequence[str], control_tokens: Sequence[str], pieces: Sequence[str]) -> str:
    kind = dice.below(12 if pieces else 8)
    if kind >= 8:
        return "".join(dice.one(pieces) + dice.one(("", "", "", " ")) for _ in range(2 + dice.below(16)))
    if kind == 0:  # part of a sentence
        sentence = dice.one(SENTENCES)
        begin = dice.below(len(sentence))
        return sentence[begin : begin + 1 + dice.below(60)]
    if kind == 1:  # runs
        return "".join(dice.one(_RUNS) * (1 + dice.below(40)) + dice.one(words)[: dice.below(6)] for _ in range(3))
    if kind == 2:  # any characters
        characters = []
        for _ in range(1 + dice.below(16)):
            low, high = dice.one(_BLOCKS)
            characters.append(chr(low + dice.below(high - low + 1)) + (" " if dice.below(5) == 0 else ""))
        return "".join(characters)
    if kind == 3:  # numbers
        digits = [
            str(dice.below(10 ** (1 + dice.below(12)))) + dice.one((" ", ".", ",", "-", "/", "", ":")) for _ in range(5)
        ]
        return "".join(digits)
    parts = []
    for _ in range(1 + dice.below(12)):  # words
        word = dice.one(words)
        change = dice.below(6)
        if change == 0:
            word = word.upper()
        elif change == 1:
            cut = dice.below(len(word))
            word = word[cut:] + word[:cut]
        elif change == 2 and control_tokens and kind == 7:
            word += dice.one(control_tokens)
        parts.append(word + dice.one(_SPACES))
    return "".join(parts)
