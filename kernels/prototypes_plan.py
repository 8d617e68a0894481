"""Tile sizes of the kernels of prototypes for each card. The form of a table is that of contrastive_plan.TILES.

Forward, a program holds BLOCK_B students, and as many teachers, of full width, and streams prototypes past them: the
more rows, the less often the prototypes are read from the L2 cache. Backward it also holds the sum of BLOCK_B gradients
in float32, so rows are fewer. Wider rows, and float32, are multiplied CHUNK columns at a time.
"""

from .contrastive_plan import Plan, Tiles, plan
from .tile import Card

FORWARD: Tiles = {
    "sm_80": {
        2: {
            64: (128, 64, 0, 8, 2, 1),
            128: (128, 32, 0, 8, 2, 1),
            256: (64, 32, 0, 4, 2, 2),
            512: (64, 64, 64, 8, 3, 2),
        },
        4: {256: (64, 32, 32, 8, 2, 1)},
        8: {64: (32, 32, 32, 4, 1, 2)},
    },
    "sm_90": {
        2: {
            64: (128, 64, 0, 8, 3, 1),
            128: (128, 64, 0, 8, 2, 1),
            256: (128, 32, 0, 8, 2, 1),
            512: (128, 64, 64, 8, 3, 1),
        },
        4: {256: (64, 64, 32, 8, 2, 1)},
        8: {64: (32, 32, 32, 4, 1, 2)},
    },
}
FORWARD["sm_100"] = FORWARD["sm_90"] | {4: {256: (64, 32, 32, 4, 2, 1)}}
FORWARD["sm_120"] = FORWARD["sm_80"] | {
    2: {64: (128, 32, 0, 8, 2, 1), 128: (64, 32, 0, 4, 2, 1), 512: (64, 32, 64, 8, 2, 2)},
    4: {256: (32, 16, 32, 4, 2, 2)},
    8: {64: (16, 16, 32, 4, 1, 2)},  # no tensor cores for float64
}
FORWARD["gfx942"] = FORWARD["sm_80"] | {2: {512: (64, 64, 64, 4, 2, 1)}, 4: {256: (64, 32, 32, 4, 1, 1)}}

BACKWARD: Tiles = {
    "sm_80": {
        2: {64: (64, 64, 0, 4, 2, 2), 128: (64, 32, 0, 8, 2, 2), 256: (64, 32, 64, 8, 2, 2)},
        4: {128: (32, 32, 32, 8, 1, 1), 256: (32, 16, 32, 8, 1, 1)},
        8: {64: (32, 32, 32, 4, 1, 1), 128: (16, 16, 32, 4, 1, 2)},
    },
    "sm_90": {
        2: {64: (128, 64, 0, 8, 2, 1), 128: (64, 64, 0, 8, 2, 1), 256: (64, 64, 0, 8, 2, 1)},
        4: {128: (64, 32, 32, 8, 2, 1), 256: (32, 16, 32, 8, 2, 1)},
        8: {64: (32, 32, 32, 4, 1, 1), 128: (16, 16, 32, 4, 1, 2)},
    },
}
BACKWARD["sm_100"] = BACKWARD["sm_90"] | {2: BACKWARD["sm_90"][2] | {256: (64, 32, 0, 8, 3, 1)}}
BACKWARD["sm_120"] = BACKWARD["sm_80"] | {
    2: BACKWARD["sm_80"][2] | {64: (64, 32, 0, 4, 2, 1), 128: (64, 32, 32, 4, 2, 1)},
    8: {128: (16, 16, 32, 8, 1, 1)},
}
BACKWARD["gfx942"] = BACKWARD["sm_80"] | {
    2: {128: (64, 32, 32, 4, 2, 1), 256: (64, 32, 32, 8, 2, 1)},
    4: {128: (32, 32, 32, 4, 1, 1), 256: (32, 16, 32, 8, 1, 1)},
}


def forward_plan(rows: int, prototypes: int, width: int, size: int, card: Card) -> Plan:
    """The plan of a forward launch. Any width takes one program: a logit needs all of it."""
    width = min(width, max(FORWARD[card.arch][size]))
    return plan(rows, prototypes, width, size, card, FORWARD)


def backward_plan(rows: int, others: int, width: int, size: int, card: Card) -> Plan:
    """The plan of a backward launch for the gradient of `rows`. Rows wider than the table take short chunks."""
    result = plan(rows, others, width, size, card, BACKWARD)
    return result._replace(chunk=min(result.chunk, 64))
