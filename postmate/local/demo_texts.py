"""What the demo user has written, asked and pictured within a year. They run content for a tour operator, a coffee
roaster and a software house, in whatever language the readers have."""

# ruff: noqa: E501  (a paragraph is one line, as in what people write)

from dataclasses import dataclass

TOURS, COFFEE, SOFTWARE = "Fjordline Cycling Tours", "Rösterei Adler", "Lumen release notes"
PROJECTS = (TOURS, COFFEE, SOFTWARE)

TERRA, SOL, LUNA = "gpt-6.1-terra", "gpt-6.1-sol", "gpt-6-luna"
SONNET, HAIKU, FLASH = "claude-sonnet-5-5", "claude-haiku-5-5", "gemini-3.8-flash"


@dataclass(frozen=True, slots=True)
class Version:
    origin: str
    model: str  # empty: edited by hand
    paragraphs: int  # of the piece's text, from its beginning
    note: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    days_ago: int  # when its first version was written; the others follow within days
    project: str
    title: str
    topic: str
    versions: tuple[Version, ...]
    text: str
    source: str = ""  # the title of the piece it was made from

    def body(self, paragraphs: int) -> str:
        return "\n\n".join(self.text.strip().split("\n\n")[:paragraphs])


@dataclass(frozen=True, slots=True)
class Conversation:
    days_ago: int
    project: str
    title: str
    model: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Pictures:
    days_ago: int
    project: str
    prompt: str
    model: str
    count: int
    idea: str = ""  # from which a model made the prompt


PIECES = (
    Piece(
        312, TOURS, "Six days along the Hardangerfjord by bike",
        "A travel report for the spring catalogue: the route, the climbs, where to sleep, for riders who tour once a year",
        (Version("draft", TERRA, 5), Version("refinement", SONNET, 9, "Add what it costs and when to go"),
         Version("edit", "", 10)),
        """# Six days along the Hardangerfjord by bike

The road out of Odda climbs for eleven kilometres before it lets you look back. When it does, the fjord lies below like a sheet of slate, and the apple orchards on the far shore are still in blossom in the last week of May.

## The route

We ride from Odda to Rosendal in six short days, 35 to 60 kilometres each. Nobody has to hurry: the ferries run every hour, and the longest climb, up to Vøringsfossen, can be taken by bus with the bikes in the trailer.

| Day | From – to | Distance | Climb |
| --- | --- | ---: | ---: |
| 1 | Odda – Lofthus | 38 km | 420 m |
| 2 | Lofthus – Eidfjord | 47 km | 510 m |
| 3 | Vøringsfossen and back | 36 km | 690 m |
| 4 | Eidfjord – Ulvik | 35 km | 540 m |
| 5 | Ulvik – Norheimsund | 58 km | 730 m |
| 6 | Norheimsund – Rosendal | 44 km | 380 m |

## What it costs

The week is 1,490 euros with half board, luggage transport and the ferries. A touring bike is 140 euros for the six days, an e-bike 260.

## When to go

The orchards bloom from the middle of May to early June. September is quieter and the light is better, but the ferry to Rosendal then sails only twice a day.

*Bring one warm layer more than you think. Everybody who did thanked us; everybody who did not bought one in Eidfjord.*""",
    ),
    Piece(
        309, TOURS, "Hardangerfjord: five posts for the launch week", "Repurposed for social media", (
            Version("repurpose", HAIKU, 7, "Social posts"),),
        """**Monday.** Eleven kilometres of climbing, and then this view. Our new week along the Hardangerfjord starts in Odda and never rides more than 60 km a day.

**Tuesday.** Apple blossom at sea level, snow at 1,200 metres. The last week of May is the only one that has both.

**Wednesday.** "I had not ridden for a year and was never the last one." – Karin, 54, who came on the test tour.

**Thursday.** What is included: half board, ferries, your luggage carried from house to house. What is not: the waffles in Ulvik. You will want the waffles in Ulvik.

**Friday.** Twelve places for each departure, and the first date is half full. The link is in our profile.

*Hashtags:* #Hardanger #CyclingNorway #SlowTravel

*Pictures:* one for each day from the folder "Hardanger May", people first, landscapes second.""",
        source="Six days along the Hardangerfjord by bike",
    ),
    Piece(
        246, TOURS, "Slik pakker du til en uke på sykkel", "Pakkeliste for gjestene, kort og vennlig, på norsk", (
            Version("draft", FLASH, 4), Version("refinement", FLASH, 6, "Legg til noe om regn")),
        """# Slik pakker du til en uke på sykkel

Du trenger mindre enn du tror. Vi kjører bagasjen fra hus til hus, så på sykkelen har du bare det du bruker i løpet av dagen.

## På sykkelen

- vindjakke og et par tørre sokker
- vannflaske, kart og en liten pumpe
- noe søtt til den siste bakken

## Når det regner

Det gjør det, i hvert fall én av dagene. En ordentlig regnjakke er viktigere enn regnbukser: våte bein tørker, en våt overkropp fryser. Skoposer veier ingenting og redder humøret.""",
    ),
    Piece(
        188, COFFEE, "Espresso zu Hause: Was die Mühle entscheidet",
        "Ratgeber für das Kundenmagazin, sachlich, mit einer Faustregel zum Schluss", (
            Version("draft", SONNET, 4), Version("refinement", SONNET, 8, "Mit einer Tabelle und einer Faustregel"),
            Version("edit", "", 9)),
        """# Espresso zu Hause: Was die Mühle entscheidet

Wer zu Hause besseren Espresso trinken möchte, kauft meist zuerst eine neue Maschine. Das ist die teuerste Art, wenig zu ändern. Die Mühle entscheidet, ob Wasser gleichmäßig durch das Kaffeemehl fließt – und damit fast alles, was danach in der Tasse ankommt.

## Woran man es schmeckt

Ist der Mahlgrad zu grob, läuft das Wasser vorbei: Der Espresso ist hell, dünn und sauer. Ist er zu fein, quält es sich hindurch und löst, was besser im Mehl geblieben wäre. Dann schmeckt es bitter und trocken.

| Durchlauf für 36 g | Geschmack | Was hilft |
| --- | --- | --- |
| unter 20 Sekunden | sauer, wässrig | feiner mahlen |
| 25 bis 30 Sekunden | rund, süß | nichts ändern |
| über 35 Sekunden | bitter, herb | gröber mahlen |

## Die Faustregel

Ändern Sie immer nur eine Sache auf einmal, und beginnen Sie mit der Mühle: 18 Gramm hinein, 36 Gramm heraus, eine knappe halbe Minute.

Und wenn es nicht gelingt? Bringen Sie Ihre Bohnen samstags mit in die Rösterei. Wir stellen die Mühle gemeinsam ein, der erste Espresso geht aufs Haus.

*Katrin Adler röstet seit 2009 in Leipzig.*""",
    ),
    Piece(
        121, COFFEE, "Le café filtre, mode d’emploi", "Fiche pour la boutique de Strasbourg, ton simple, six étapes", (
            Version("draft", SONNET, 3), Version("refinement", HAIKU, 5, "Ajoute ce qu’il faut éviter")),
        """# Le café filtre, mode d’emploi

Un bon café filtre demande trois choses : de l’eau juste avant l’ébullition, une mouture moyenne et quatre minutes de patience.

1. Rincez le filtre à l’eau chaude.
2. Comptez 60 grammes de café par litre.
3. Versez un peu d’eau et laissez gonfler trente secondes.
4. Versez le reste en cercles, sans vous presser.
5. Attendez que le lit de café soit plat.
6. Servez aussitôt.

## Ce qu’il faut éviter

Ne laissez jamais la cafetière sur la plaque : en vingt minutes, le meilleur café devient amer. Un thermos coûte moins cher que les regrets.""",
    ),
    Piece(
        64, TOURS, "Weekend na rowerze: dwa dni na Mierzei Wiślanej",
        "Krótka zapowiedź wycieczki dla gości z Polski, prostym językiem", (Version("draft", FLASH, 5),),
        """# Weekend na rowerze: dwa dni na Mierzei Wiślanej

Z jednej strony morze, z drugiej zalew, a między nimi sosnowy las i równa ścieżka. Mierzeja jest tak wąska, że słychać oba brzegi naraz.

**Pierwszego dnia** jedziemy z Mikoszewa do Kątów Rybackich, niespełna trzydzieści kilometrów. Po drodze jest czas na rezerwat kormoranów i na zupę rybną w porcie.

**Drugiego dnia** droga prowadzi przez Krynicę Morską aż do nowego kanału. Z mostu widać statki, które przepływają z zalewu na otwarte morze.

Bagaże wozimy od noclegu do noclegu. Wystarczy zabrać wodę, aparat i trochę ciekawości.""",
    ),
    Piece(
        33, SOFTWARE, "What changes with Lumen 4", "Release notes for administrators: what is new, what to do before the upgrade",
        (Version("draft", SOL, 6), Version("refinement", SOL, 10, "Add what to check before upgrading")),
        """# What changes with Lumen 4

Lumen 4 is faster where you wait most: opening a large report takes two seconds where it took nine. Nothing you have built has to be changed.

## New

- **Shared filters.** Save a filter once and use it in every report of your team.
- **Exports that resume.** A download that breaks off goes on where it stopped.
- **Roles for guests.** Let somebody comment without letting them share.

## Changed

The old export format is still written, and will be until version 5. New installations write the new one.

## Before you upgrade

1. Make a backup, and restore it once on another machine.
2. Read the list of removed settings; the check `lumen doctor` names those that you use.
3. Plan ten minutes without reports for every million rows.

## After the upgrade

Open the status page. When all four lights are green, delete the backup of the old search index: it is large, and nothing reads it any more.""",
    ),
    Piece(
        5, SOFTWARE, "Cinco preguntas antes de migrar sus datos",
        "Entrada de blog para clientes de América Latina: práctica, sin tecnicismos", (
            Version("draft", TERRA, 7), Version("refinement", TERRA, 8, "Un cierre con una acción concreta")),
        """# Cinco preguntas antes de migrar sus datos

Una migración tranquila se decide antes de copiar la primera fila. Estas son las preguntas que hacemos a cada cliente, y las respuestas que nos hacen detenernos.

**1. ¿Quién usa estos datos el lunes a las nueve?** Si nadie lo sabe, todavía no es el momento.

**2. ¿Qué se puede dejar atrás?** En promedio, un tercio de las tablas no se ha leído en dos años.

**3. ¿Cómo sabrá que todo llegó?** Cuente las filas, pero compare también las sumas.

**4. ¿Cuánto tiempo puede volver atrás?** Conserve el sistema anterior, en modo de lectura, al menos un mes.

**5. ¿Quién da la señal?** Una sola persona, con nombre y teléfono.

Elija hoy una tabla pequeña y responda las cinco preguntas para ella. Tardará una tarde, y la migración de verdad será aburrida: justo lo que se busca.""",
    ),
)  # fmt: skip

CHATS = (
    Conversation(
        205, TOURS, "A name for the autumn tour", SONNET, (
            ("We need a name for a five-day bike tour in October: Jutland, dunes, few people. Ten ideas, please.",
             "1. Dunes to Ourselves\n2. The Long Shore\n3. October Light\n4. North Sea, Slowly\n5. After the Season\n"
             "6. Five Days of Wind\n7. Sand and Sky\n8. The Quiet Coast\n9. West of Everything\n10. Tailwind to Skagen\n\n"
             "“After the Season” says what is special about October without asking to be explained."),
            ("I like 5 and 8. Which one works better in German as well?",
             "“The Quiet Coast” does: **Die stille Küste** is short, sounds natural and can be searched for. “Nach der "
             "Saison” sounds like a discount sale."),
            ("Then The Quiet Coast it is. One sentence for the cover?",
             "> *Five days by bike between dunes and sea, when the summer has gone home.*"),
        ),
    ),
    Conversation(
        97, COFFEE, "Rückfragen zur Herkunft", HAIKU, (
            ("Ein Kunde fragt, warum wir „direkt gehandelt“ schreiben und nicht „fair“. Kannst du eine Antwort in drei "
             "Sätzen entwerfen?",
             "„Fair“ ist ein Siegel mit festen Regeln, und unsere Bauern haben es nicht beantragt, weil die Gebühren für "
             "kleine Höfe hoch sind. „Direkt gehandelt“ heißt bei uns: Wir kennen den Hof, kaufen ohne Zwischenhändler "
             "und veröffentlichen jedes Jahr, was wir bezahlt haben. Die Preise von diesem Jahr finden Sie auf unserer "
             "Seite, sie liegen 38 Prozent über dem Börsenpreis."),
            ("Gut. Etwas wärmer im Ton, bitte.",
             "Danke für die gute Frage! „Fair“ ist ein Siegel, das für kleine Höfe oft zu teuer ist – deshalb verwenden "
             "wir das Wort nicht. Wir besuchen unsere Bauern jedes Jahr selbst und kaufen direkt bei ihnen. Was wir "
             "bezahlen, steht offen auf unserer Seite: zurzeit 38 Prozent mehr als an der Börse."),
        ),
    ),
    Conversation(
        2, SOFTWARE, "Explaining the new roles", LUNA, (
            ("How do I explain the difference between a guest and a viewer to somebody who has never seen the product?",
             "Think of a library. A **viewer** has a card: they may read everything on the open shelves. A **guest** was "
             "brought along by somebody: they read what was put on the table for them, may write on the sticky notes, "
             "and leave when the visit is over."),
            ("Nice. Turn it into a tooltip of at most 90 characters each.",
             "- **Viewer:** Reads all reports of the team. Changes and shares nothing.\n"
             "- **Guest:** Sees and comments on the reports you share, for as long as you share."),
        ),
    ),
)  # fmt: skip

PICTURES = (
    Pictures(
        300, TOURS, "Morning fog over a Norwegian fjord, seen from a gravel road, a single cyclist far away",
        "gpt-image-2", 2, idea="the fjord before breakfast",
    ),
    Pictures(
        176, COFFEE, "Rolling coffee hills at dawn, warm light, seen from above, space for a headline at the top",
        "gemini-3.1-flash-image", 2,
    ),
    Pictures(11, TOURS, "Dunes at dusk by the North Sea, a poster in four colours for an autumn tour", "gpt-image-2", 1),
)  # fmt: skip
