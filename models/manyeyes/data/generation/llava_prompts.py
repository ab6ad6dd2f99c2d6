"""What a language model is told for LLaVA's three kinds of data.

The structure is the paper's (LLaVA, arXiv:2304.08485, appendix): captions and boxes as context, a system message, a few
examples, for conversations captions alone. Every sentence and every example here is our own.
"""

from __future__ import annotations

from manyeyes.data.generation.interview import Prompt

_MARKET = """A woman in a straw hat sells tomatoes at a street market.
Crates of red tomatoes and green peppers stand on a wooden table.
A customer with a blue bag points at a crate of tomatoes.
Two people at a vegetable stall on a sunny street.
A market stall under a striped awning with vegetables in crates."""
_MARKET_BOXES = """

person: [0.120, 0.210, 0.365, 0.905]
person: [0.655, 0.248, 0.870, 0.962]
handbag: [0.702, 0.540, 0.806, 0.741]
dining table: [0.251, 0.583, 0.742, 0.948]"""
_PIER = """A brown dog jumps from a pier into a lake.
A dog is in the air above the water, a red ball in front of it.
Three children stand on a wooden pier and watch a dog jump.
A dog leaps after a ball while kids cheer.
A lake with mountains behind it and a dog in mid-air."""
_PIER_BOXES = """

dog: [0.452, 0.301, 0.668, 0.472]
sports ball: [0.731, 0.342, 0.762, 0.390]
person: [0.081, 0.247, 0.169, 0.655]
person: [0.177, 0.262, 0.258, 0.659]
person: [0.269, 0.301, 0.340, 0.652]"""
_KITCHEN = """A narrow kitchen with a bicycle leaning against the oven.
A bike is parked in a small white kitchen.
Dishes are stacked in the sink beside a window with a plant.
A cat sits on the window sill above a full sink.
A cramped kitchen holding a bicycle, a stove and a refrigerator."""
_KITCHEN_BOXES = """

bicycle: [0.098, 0.405, 0.521, 0.957]
oven: [0.310, 0.433, 0.560, 0.871]
sink: [0.602, 0.466, 0.823, 0.561]
cat: [0.688, 0.241, 0.775, 0.405]
potted plant: [0.801, 0.220, 0.866, 0.398]
refrigerator: [0.871, 0.151, 0.998, 0.949]"""

_UNSEEN = (
    "Write as somebody who looks at the image itself: never mention captions, sentences, descriptions, boxes or "
    "coordinates, and never say where you know something from. Say nothing that does not follow from what you get."
)

CONVERSATION = Prompt(
    name="conversation 1",
    system=(
        "You get to know one image through a few sentences, each of which describes that same image. Write a dialogue "
        "between a person who asks about the image and an assistant who sees it and answers.\n"
        "Ask about different things that can be seen: which objects there are, how many, what they do, where they are, "
        "and how they stand to each other. Ask only what has a certain answer: something that is surely in the image, "
        "or surely is not. Add one or two harder questions, about the background of what is shown or what it may lead "
        "to, and answer these at length, with reasons.\n"
        f"{_UNSEEN}\n"
        "Write each question and each answer like this, and nothing else:\n"
        "Question:\n(the question)\n===\nAnswer:\n(the answer)\n==="
    ),
    examples=(
        (
            _MARKET,
            "Question:\nWhat is sold at the stall?\n===\nAnswer:\nTomatoes and green peppers are sold there.\n===\n"
            "Question:\nWhat does the woman who sells wear on her head?\n===\nAnswer:\nShe wears a straw hat.\n===\n"
            "Question:\nWhat is the customer doing?\n===\nAnswer:\nThe customer, who carries a blue bag, points at a "
            "crate of tomatoes.\n===\n"
            "Question:\nWhy may the stall have an awning?\n===\nAnswer:\nThe street is sunny, and a striped awning "
            "gives shade. It keeps the vegetables from wilting in the heat, so that they look fresh for longer, and it "
            "makes standing there more pleasant for the seller and her customers. Its stripes also make the stall easy "
            "to find among others.\n===",
        ),
        (
            _PIER,
            "Question:\nWhich animal is in the air?\n===\nAnswer:\nA brown dog is in the air; it has just jumped from "
            "a pier.\n===\n"
            "Question:\nHow many children watch?\n===\nAnswer:\nThree children stand on the pier and watch.\n===\n"
            "Question:\nWhat lies behind the lake?\n===\nAnswer:\nThere are mountains behind the lake.\n===\n"
            "Question:\nWhat does the dog seem to be after, and what will probably happen next?\n===\nAnswer:\nThe dog "
            "leaps after a red ball that is in front of it above the water. It will most likely land in the lake with "
            "a splash, swim to the ball, take it in its mouth and bring it back towards the pier, where the children "
            "may throw it once more.\n===",
        ),
    ),
    max_tokens=1500,
)

DETAIL = Prompt(
    name="detailed description 1",
    system=(
        "You get to know one image through a few sentences that describe it, and through objects with their places: "
        "left, top, right and bottom, as shares of the width and height of the image.\n"
        "Describe the image thoroughly, in one or more paragraphs: what is there, how many of each, what they do, how "
        "they look, where they are in the image and how they stand to each other. Tell places in words, such as on "
        "the left or in the background.\n"
        f"{_UNSEEN}"
    ),
    examples=(
        (
            _MARKET + _MARKET_BOXES,
            "The image shows a vegetable stall on a sunny street. On the left, a woman in a straw hat stands behind a "
            "wooden table that fills the middle of the picture; crates of red tomatoes and green peppers are set out "
            "on it. On the right, closer to the viewer, a customer with a blue bag at the hip points at one of the "
            "crates of tomatoes. A striped awning spans the stall and shades the goods. The two people face each other "
            "across the table, as if a purchase were about to be made.",
        ),
        (
            _PIER + _PIER_BOXES,
            "A brown dog hangs in mid-air above a lake, a little right of the centre, stretched towards a red ball "
            "that flies just ahead of it on the right. It has leapt from a wooden pier on the left of the picture, "
            "where three children stand close to each other and cheer it on. The lake spreads below, and mountains "
            "rise behind it. The whole scene is full of movement: the dog's leap, the ball out of its reach and the "
            "children who follow both with their eyes.",
        ),
        (
            _KITCHEN + _KITCHEN_BOXES,
            "This is a narrow white kitchen in which hardly any room is left. In the foreground on the left a bicycle "
            "leans against the oven and covers most of its front. To the right of the oven is a sink, full of stacked "
            "dishes, below a window. A cat sits on the window sill above the sink, with a potted plant beside it on "
            "the right. A refrigerator closes the room off on the far right. The bicycle looks out of place among the "
            "appliances and shows how little space there is.",
        ),
    ),
)

COMPLEX = Prompt(
    name="complex reasoning 1",
    system=(
        "You get to know one image through a few sentences that describe it, and through objects with their places: "
        "left, top, right and bottom, as shares of the width and height of the image.\n"
        "Write one question that can only be answered by somebody who understands the image and also knows about the "
        "world: why something is as it is, what follows from it, what one should do, or what to be careful about. Do "
        "not give away in the question what can be seen: leave that to be found. Then answer it in detail, step by "
        "step, so that each conclusion rests on what is visible.\n"
        f"{_UNSEEN}\n"
        "Write like this, and nothing else:\nQuestion:\n(the question)\n===\nAnswer:\n(the answer)\n==="
    ),
    examples=(
        (
            _MARKET + _MARKET_BOXES,
            "Question:\nWhat can the seller do to keep her goods fresh until the evening?\n===\nAnswer:\nThe stall "
            "stands on a sunny street, so heat is the greatest danger to the tomatoes and peppers. The striped awning "
            "already shades the table; she can move crates that come to lie in the sun as it wanders, and keep those "
            "that she does not need under the table, where it is coolest. Tomatoes bruise under their own weight, so "
            "they should lie in shallow layers, and as customers choose from the crates she can sort out damaged ones, "
            "which would spoil the others. A damp cloth over the peppers would keep them crisp.\n===",
        ),
        (
            _PIER + _PIER_BOXES,
            "Question:\nWhat should a grown-up pay attention to in this situation?\n===\nAnswer:\nThree children stand "
            "close together on a wooden pier with water around it, and their attention is on the dog that has just "
            "leapt. In their excitement one of them could step too near to the edge or be pushed, so somebody who can "
            "swim should be within reach, and small children should wear life jackets. Wet wood is slippery, more so "
            "when the dog comes back and shakes itself. The dog also needs a place where it can climb out, and the "
            "depth of the water should be known before anybody is allowed to jump after it.\n===",
        ),
        (
            _KITCHEN + _KITCHEN_BOXES,
            "Question:\nWhat does this room tell about the person who lives there?\n===\nAnswer:\nThe kitchen is so "
            "narrow that a bicycle has to lean against the oven, which suggests a small home without a cellar or a "
            "safe place outside; the owner probably rides it daily and does not want it stolen. While it stands there "
            "the oven can hardly be opened, so little is baked, though the stacked dishes show that people do eat at "
            "home and have put off washing up. The cat and the plant on the window sill are looked after in spite of "
            "the lack of room. All this fits somebody busy, who lives in a city and has grown used to making do.\n===",
        ),
    ),
    max_tokens=1200,
)

DETAIL_QUESTIONS = (
    "Describe the image in detail.",
    "What do you see in this picture? Be as thorough as you can.",
    "Give a full account of everything this image shows.",
    "Take a close look at the photo and tell me all about it.",
    "Walk me through the image, with every detail that matters.",
    "Write a comprehensive description of the scene.",
    "Can you describe this image at length?",
    "Explain in detail what is shown here.",
    "Tell me everything that can be seen in this picture.",
    "Portray the scene so that somebody who cannot see it can imagine it.",
    "What is in this image, where is it, and how does it look?",
    "Please analyse the image closely and describe what it contains.",
)
"""One of them stands before each detailed description."""
