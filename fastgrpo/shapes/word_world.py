"""Prompts of the world of words: a sign that shows a short word, or a number, in a font.

The prompt set is closed: `all_prompts` enumerates it, `split` divides it by word and by font: a held-out prompt's word
is in no training prompt, and one of the six fonts is in none either.
"""

import functools
import hashlib
import itertools
import random
import string
from dataclasses import dataclass

# Files of DejaVu and STIX, as matplotlib ships them.
FONTS: dict[str, str] = {
    "sans": "DejaVuSans",
    "bold sans": "DejaVuSans-Bold",
    "serif": "STIXGeneral",
    "bold serif": "STIXGeneralBol",
    "mono": "DejaVuSansMono",
    "bold mono": "DejaVuSansMono-Bold",
}
HELD_OUT_FONT = "bold serif"
# A word, a number of two to four digits, letters at random; a held-out word in the font that no training prompt has.
CATEGORIES: tuple[str, ...] = ("word", "number", "letters", "new_font")

WORDS: tuple[str, ...] = tuple(
    """
    ACE ACT ADD AGE AID AIM AIR ANT APE ARM ART ASH ASK AXE BAD BAG BAR BAT BAY BED BEE BEG BET BIG BOX BOY BUD BUG
    BUN BUS BUY CAB CAN CAP CAR CAT COD COW CRY CUB CUP CUT DAD DAY DEN DEW DIG DIM DOG DOT DRY DUE EAR EAT EGG ELF
    ELM END EYE FAN FAR FAT FED FEW FIG FIN FIT FIX FLY FOG FOX FUN FUR GAP GAS GEM GET GUM GUN GYM HAM HAT HAY HEN
    HID HIP HIT HOP HOT HUB HUG HUT ICE INK INN JAM JAR JAW JET JOB JOG JOY KEY KID KIT LAB LAP LAW LEG LID LIP LOG
    LOW MAD MAN MAP MAT MIX MOB MUD MUG NAP NET NEW NOD NUT OAK OAR ODD OIL OLD ONE OWL PAD PAN PAW PAY PEA PEN PET
    PIE PIG PIN POT PUB RAG RAM RAT RAW RED RIB ROD ROW RUB RUG RUN SAD SAP SAW SEA SET SHY SIP SIT SIX SKI SKY SOB
    SON SUM SUN TAB TAG TAN TAP TAR TAX TEA TEN TIE TIN TIP TOE TOP TOY TUB TUG TWO URN USE VAN VET VOW WAX WEB WET
    WIG WIN YAK YES ZAP ZIP ZOO
    ABLE ACID AREA ARMY AWAY BABY BACK BALL BAND BANK BARN BASE BATH BEAR BELL BELT BIRD BLUE BOAT BODY BOLD BOOK BORN
    BOWL BURN BUSY CAFE CAKE CALM CAMP CARD CARE CAVE CHEF CITY CLUB COAT CODE COIN COLD COOK COPY CORN COZY CROW CUBE
    DARK DATE DAWN DEEP DEER DESK DIVE DOOR DOVE DRUM DUCK DUSK DUST EAST EASY ECHO EDGE EXIT FACE FAIR FARM FAST FERN
    FILM FIRE FISH FIVE FLAG FLAT FOLK FOOD FORK FOUR FREE FROG FUEL GAME GATE GIFT GLAD GLUE GOAT GOLD GOLF GRAY GRID
    HAIR HAND HARP HAWK HERO HIGH HIKE HILL HOME HOPE HORN HUGE ICON IDEA INCH IRON JADE JAZZ JOIN JUMP JURY KEEP KIND
    KING KITE KNOT LAKE LAMB LAMP LAND LAVA LAZY LEAF LIFE LION LOCK LOVE LUCK MANY MARK MENU MILK MIND MINT MOON MOSS
    NAIL NAVY NEST NINE NOON NOSE NOTE OPEN ORCA OVAL OVEN PALM PARK PATH PEAK PINE PINK PLUM POET POND QUAY QUIZ RAIN
    RICE RING ROAD ROCK ROOF ROPE ROSE SAFE SAIL SALT SAND SEED SHIP SHOP SILK SNOW SOAP SOFA SOUP STAR STOP SWAN TAXI
    TENT TIDE TOWN TREE TUBE TUNA TWIN UNIT VASE VERB VINE WALK WALL WARM WAVE WEST WILD WIND WOLF WOOD YARD YEAR YOGA
    ZERO ZINC ZONE ZOOM
    """.split()  # noqa: SIM905 - as a list it would be four hundred lines
)


@dataclass(frozen=True)
class WordPrompt:
    """A prompt: which text, in which of `FONTS`."""

    word: str
    font: str
    category: str

    @property
    def text(self) -> str:
        return f'a sign that says "{self.word}" in {self.font}'


@functools.cache
def texts() -> dict[str, tuple[str, ...]]:
    """What signs may say, by category: each text once."""
    draw = random.Random(0)
    numbers = sorted({str(draw.randrange(10, 10_000)) for _ in range(400)} | {str(n) for n in range(10, 100, 7)})
    letters = {"".join(draw.choice(string.ascii_uppercase) for _ in range(draw.choice((3, 4)))) for _ in range(600)}
    return {"word": WORDS, "number": tuple(numbers), "letters": tuple(sorted(letters - set(WORDS)))}


@functools.cache
def split() -> tuple[tuple[WordPrompt, ...], tuple[WordPrompt, ...]]:
    """(train, held-out): a fifth of the texts of each category is held out, and so is one font."""
    train, held_out = [], []
    for category, known in texts().items():
        ranked = sorted(known, key=lambda text: hashlib.sha256(text.encode()).digest())
        kept = round(len(ranked) / 5)
        for text, font in itertools.product(ranked, FONTS):
            if font == HELD_OUT_FONT:
                if category == "word" and text in ranked[:kept]:
                    held_out.append(WordPrompt(text, font, "new_font"))
            else:
                (held_out if text in ranked[:kept] else train).append(WordPrompt(text, font, category))
    return tuple(train), tuple(held_out)


@functools.cache
def all_prompts() -> tuple[WordPrompt, ...]:
    """Every prompt of the world, each text once, in a fixed order."""
    return tuple(itertools.chain(*split()))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every token that occurs in a prompt: words of small letters, and each other character by itself."""
    return (
        "a",
        "sign",
        "that",
        "says",
        "in",
        "bold",
        "sans",
        "serif",
        "mono",
        '"',
        *string.ascii_uppercase,
        *string.digits,
    )
