"""Where a launch finds its arguments: the words of the table that the host fills and the kernels read.

Note [The table on the device]
Everything that a launch needs to know stands in one buffer of 64-bit words on the device: a header, a record for each
parameter group, and a record for each tensor with its addresses. The host fills it anew for every launch and copies it
to the device only if a word has changed, so in a training loop whose gradients keep their places nothing is copied, and
an address that moves never compiles a kernel anew. Numbers of float64 are stored as their bits.

A second buffer, made once for a list of tensors, has a word for each chunk: the tensor's row above, the number of the
chunk within the tensor below. One program of a kernel works on one chunk.
"""

from __future__ import annotations

MAX_LISTS = 3

# Columns of tensors. A row's addresses stand in this order.
WEIGHT, SNAPSHOT, LIST = 0, 1, 2
STATE = LIST + MAX_LISTS  # the base optimizer's state tensors
MAX_STATES = 3
STEP = STATE + MAX_STATES
COLUMNS = STEP + 1

# The header.
RULE_PARAMETERS = 0  # of the rule, float64
MAX_RULE_PARAMETERS = 4
GRAD_SCALE = 4  # a scalar
GRAD_SCALE_KIND = 5
FOUND_INF = 6  # address of a float32, or 0
SKIP = 7  # 1 to restore without an update
HEADER_WORDS = 8

# A group's record. A scalar is a float64, or the address of a number on the device, as its kind says.
VALUE, FLOAT32, FLOAT64 = 0, 1, 2
GROUP_KINDS = 0  # of the scales, 2 bits each, then of lr
SCALES = 1
LR = SCALES + MAX_LISTS
SETTINGS = LR + 1  # the base optimizer's others in their order, float64; flags are 0 or 1
MAX_SETTINGS = 7
GROUP_WORDS = SETTINGS + MAX_SETTINGS

# A tensor's record.
NUMEL = 0
FLAGS = 1
GROUP = 2
ETA = 3  # geometry: T = |w| + eta, or T = 1 if negative
CORRECTIONS = 4  # what follows from a step count that is on the host, float64
MAX_CORRECTIONS = 2
POINTERS = CORRECTIONS + MAX_CORRECTIONS
ROW_WORDS = POINTERS + COLUMNS
HELD, FIRST, HAS_GRADIENT, STEP_ON_DEVICE, STEP_IS_DOUBLE = 1, 2, 4, 8, 16

# Where the lists' coefficients come from: ones, float64 numbers in device memory, or the report of a launch before.
ONES, NUMBERS, REPORT = 0, 1, 2

# Memory that launches share, in float64 words: tickets and counters, then partial sums of Gram matrices.
GRAM_TICKET, STEP_TICKET, ARRIVED, DEPARTED = 0, 1, 2, 3  # int32
PARTIALS = 2
VIRTUAL_BLOCKS = 1024
MAX_PAIRS = MAX_LISTS * (MAX_LISTS + 1) // 2

# What a launch with a Gram matrix reports, float64.
FINITE = 0
GRAM = 1
COEFFICIENTS = GRAM + MAX_LISTS * MAX_LISTS
REPORT_SIZE = COEFFICIENTS + MAX_LISTS
