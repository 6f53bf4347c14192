# ruff: noqa: E501 – wide characters, and lines of tables
"""Texts of every kind that people paste, and of the kinds that tokenizers are bad at: what a count is held against."""

import base64
import json
import random
from collections.abc import Callable, Mapping

LANGUAGES: Mapping[str, str] = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood. The first flush of green tea is picked "
    "in April, when the leaves are small and sweet; a good shop sells it within a few weeks, before summer comes.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
    "begabt und sollen einander im Geist der Brüderlichkeit begegnen. Die Rechtsschutzversicherungsgesellschaft "
    "überprüft außerdem die Geschäftsbedingungen, bevor die Lieferverträge unterzeichnet werden.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité. L'été dernier, nous avons bu "
    "du thé vert près de l'étang, où les grenouilles chantaient jusqu'à minuit.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros. ¿Cuánto cuesta el té verde de este año?",
    "Portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "Italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di "
    "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "Dutch": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en "
    "geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni "
    "rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "Czech": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a "
    "mají spolu jednat v duchu bratrství.",
    "Hungarian": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és "
    "lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek.",
    "Finnish": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki "
    "ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä.",
    "Swedish": "Alla människor är födda fria och lika i värde och rättigheter. De är utrustade med förnuft och samvete "
    "och bör handla gentemot varandra i en anda av broderskap.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con người đều "
    "được tạo hóa ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình bằng hữu.",
    "Indonesian": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama. Mereka dikaruniai akal "
    "dan hati nurani dan hendaknya bergaul satu sama lain dalam semangat persaudaraan.",
    "Swahili": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri, hivyo yapasa "
    "watendeane kindugu.",
    "Russian": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью "
    "и должны поступать в отношении друг друга в духе братства.",
    "Ukrainian": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю "
    "і повинні діяти у відношенні один до одного в дусі братерства.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι "
    "με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם "
    "לנהוג איש ברעהו ברוח של אחווה.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلًا وضميرًا وعليهم أن يعامل بعضهم بعضًا "
    "بروح الإخاء.",
    "Persian": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان هستند و "
    "باید نسبت به یکدیگر با روح برادری رفتار کنند.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और "
    "अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। তাঁদের বিবেক এবং বুদ্ধি আছে; "
    "সুতরাং সকলেরই একে অপরের প্রতি ভ্রাতৃত্বসুলভ মনোভাব নিয়ে আচরণ করা উচিত।",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், உரிமைகளிலும் சமமானவர்கள்.",
    "Telugu": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม "
    "และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "Burmese": "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ တူညီလွတ်လပ်သော အခွင့်အရေးများဖြင့် လည်းကောင်း မွေးဖွားလာသူများ ဖြစ်သည်။",
    "Khmer": "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព ក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។",
    "Amharic": "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար՝ իրենց արժանապատվությամբ ու իրավունքներով։",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。"
    "绿茶的头一批在四月采摘，叶子又小又甜；好的茶店几个星期之内就卖完了。",
    "Chinese, traditional": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを"
    "授けられており、互いに同胞の精神をもって行動しなければならない。コーヒーを飲む人のための緑茶の手紙です。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 "
    "서로 형제애의 정신으로 행동하여야 한다.",
}  # fmt: skip

CODE = '''def settle(usage_id: int, pools: TokenPools, *, is_estimated: bool = False) -> Posting:
    """Charge what the operation cost, at most what was reserved."""
    usage = _get_usage(usage_id)
    if usage.status != "reserved":
        raise UsageAlreadyClosed(f"{usage_id=} was closed as {usage.status!r}")
    return _close(_SETTLE, {"usage_id": usage_id, **_fields(pools)}, closed_as="succeeded")
'''
JAVASCRIPT = """const byId = new Map(rows.filter((r) => !r.isGone).map((r) => [r.id, { ...r, at: Date.parse(r.at) }]));
document.querySelectorAll("[data-operation]").forEach((el) => el?.addEventListener("click", async (e) => {
  const res = await fetch(`/api/v1/usage/${el.dataset.id}?limit=${100 * 2}`, { headers: { Accept: "a/b" } });
  if (!res.ok || res.status >= 400) throw new Error(`HTTP_${res.status}`);
}));
"""
HTML = '<div class="card mb-3" data-id="42"><a href="/tokens/?page=2&amp;sort=-at" aria-label="Next">→</a></div>\n'
MATHEMATICS = (
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε. ∫₀^∞ e^{−x²} dx = √π⁄2, ∑_{n=1}^{∞} 1/n² = π²/6, ∇×E = −∂B/∂t, "
    "\\frac{\\partial^2 u}{\\partial t^2} = c^2 \\nabla^2 u \\quad \\text{for } x \\in \\Omega \\subset \\mathbb{R}^n. "
)


def _random(seed: int, draw: Callable[[random.Random], str], count: int) -> str:
    dice = random.Random(seed)  # noqa: S311 – the same texts each time
    return "".join(draw(dice) for _ in range(count))


def _table() -> str:
    dice = random.Random(1)  # noqa: S311
    rows = "".join(
        f"| {number} | tea-{number:04} | {dice.randint(1, 99_999) / 100:.2f} | {dice.random():.3%} |\n"
        for number in range(60)
    )
    return f"| # | SKU | Price | Share |\n|---|:----|------:|:-----:|\n{rows}"


def _csv() -> str:
    return _random(2, lambda dice: ",".join(str(dice.randint(0, 10**9)) for _ in range(8)) + "\n", 60)


def _json() -> str:
    dice = random.Random(3)  # noqa: S311
    return json.dumps(
        [{"id": dice.getrandbits(64), "ok": dice.random() < 0.5, "x": dice.random(), "tags": ["a", None]}
         for _ in range(40)]
    )  # fmt: skip


def _characters(*ranges: tuple[int, int]) -> Callable[[random.Random], str]:
    def draw(dice: random.Random) -> str:
        return chr(dice.randint(*dice.choice(ranges)))

    return draw


_BYTES = random.Random(4).randbytes(2_000)  # noqa: S311

OTHERS: Mapping[str, str] = {
    "Python": CODE * 3,
    "JavaScript": JAVASCRIPT * 3,
    "HTML": HTML * 10,
    "SQL": "SELECT u.id, count(*) FILTER (WHERE t.amount < 0) AS n FROM users u LEFT JOIN t USING (id) GROUP BY 1;\n" * 8,
    "Markdown table": _table(),
    "CSV of digits": _csv(),
    "JSON": _json(),
    "base64": base64.b64encode(_BYTES).decode(),
    "hexadecimal": _BYTES.hex(),
    "UUIDs": _random(5, lambda dice: f"{dice.getrandbits(128):032x}-", 60),
    "addresses": _random(6, lambda d: f"https://x{d.randint(1, 99)}.example/p?q={d.getrandbits(50):x}&t=%20%C3\n", 40),
    "IP addresses and times": _random(
        7, lambda d: f"10.{d.randint(0, 255)}.{d.randint(0, 255)}.1 [{d.randint(1, 28):02}/Nov/2026:11:{d.randint(10, 59)}:07 +0000]\n", 40
    ),
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🍵☕️👍🏽🇩🇪🎉🧑🏿‍🚀 " * 30,
    "random emoji": _random(8, _characters((0x1F300, 0x1F64F), (0x1F900, 0x1F9FF)), 400),
    "mathematics": MATHEMATICS * 4,
    "bold mathematical letters": _random(9, _characters((0x1D400, 0x1D7CB)), 300),
    "dingbats and boxes": _random(10, _characters((0x2190, 0x21FF), (0x2500, 0x257F), (0x2700, 0x27BF)), 400),
    "spaces": " " * 3_000,
    "tabs and line ends": "\t\n  \n\t \n\n" * 300,
    "one letter": "a" * 3_000,
    "one capital": "W" * 3_000,
    "one dash": "-" * 3_000,
    "one ideograph": "的" * 1_000,
    "one emoji": "🍵" * 700,
    "words of one letter": "q x z j " * 400,
    "random letters": _random(11, lambda dice: dice.choice("abcdefghijklmnopqrstuvwxyz"), 3_000),
    "random words": _random(12, lambda d: "".join(d.choices("abcdefghijklmnopqrstuvwxyz", k=d.randint(2, 9))) + " ", 400),
    "random capitals": _random(13, lambda dice: dice.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 3_000),
    "letters in mixed case": _random(14, lambda dice: dice.choice("aBcDeFgHiJkLmNoPqRsTuVwXyZ"), 3_000),
    "random ASCII": _random(15, _characters((0x21, 0x7E)), 3_000),
    "random digits": _random(16, lambda dice: dice.choice("0123456789"), 3_000),
    "digits and spaces": _random(17, lambda dice: dice.choice("0123456789") + " ", 1_500),
    "punctuation": _random(18, lambda dice: dice.choice("!?.,;:'\"()[]{}<>/\\|@#$%^&*_+=~`-"), 3_000),
    "Latin with accents": _random(19, _characters((0xC0, 0x24F)), 1_000),
    "stacked accents": "e\u0301\u0323\u0308o\u0302\u0331 " * 200,
    "rare ideographs": _random(20, _characters((0x3400, 0x4DBF), (0x20000, 0x2A6DF)), 400),
    "random Hangul": _random(21, _characters((0xAC00, 0xD7A3)), 800),
    "ancient scripts": _random(22, _characters((0x12000, 0x12399), (0x13000, 0x1342E), (0x10900, 0x1091B)), 300),
    "any character": _random(23, _characters((0x20, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x1FFFF)), 600),
    "unpaired joiners": "\u200b\u200d\ufe0f\u2060\ufeff" * 200,
}  # fmt: skip

TEXTS: Mapping[str, str] = {name: text * 4 for name, text in LANGUAGES.items()} | dict(OTHERS)
