"""Optimizers that trainers drive: methods with one, two and three passes, fused bases and one that is not."""

from __future__ import annotations

import torch

from sam_optim import CRSAM, GSAM, SAM, WSAM, IntervalSAM, LookSAM, MomentumSAM, SAMPa

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}

MAKERS = {
    "SAM": lambda m: SAM(m.parameters(), torch.optim.AdamW, rho=0.1, **ADAMW),
    "SAM, RMSprop": lambda m: SAM(m.parameters(), torch.optim.RMSprop, rho=0.1, lr=1e-3),
    "GSAM": lambda m: GSAM(m.parameters(), torch.optim.AdamW, rho=0.1, **ADAMW),
    "WSAM": lambda m: WSAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1),
    "LookSAM": lambda m: LookSAM(m.parameters(), torch.optim.SGD, rho=0.1, k=2, lr=0.1),
    "CR-SAM": lambda m: CRSAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1),
    "Momentum-SAM": lambda m: MomentumSAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9),
    "IntervalSAM": lambda m: IntervalSAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, every=2),
    "SAMPa": lambda m: SAMPa(m.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9),
}
