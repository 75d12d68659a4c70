"""Training on several ranks: FSDP2, tensor-parallel placements, DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sam_kernels import Peers, Plan, UnsupportedTensorError
from sam_optim import SAM, InvalidSettingError, SAMPa, StabilityMonitor, TrainStep

from . import checkpointing, plain_parts, programs
from .ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


@pytest.mark.parametrize(
    "program",
    [
        programs.fsdp_trains_like_one_process,
        programs.norms_are_global,
        programs.micro_batches_and_clipping,
        programs.exceptions_and_infinities,
        programs.mixed_precision,
        programs.checkpoints,
        programs.data_parallel,
        programs.gradients_in_buckets,
        programs.zero_redundancy,
        programs.grad_scaler,
        programs.fsdp_of_version_1,
    ],
)
def test_two_ranks(program):
    on_ranks(2, program, 2)


def test_checkpoints_for_other_numbers_of_ranks(tmp_path):
    """Each in fresh processes: saved by two ranks, loaded and saved by one, loaded by two."""
    first, second = str(tmp_path), str(tmp_path / "again")
    on_ranks(2, checkpointing.save, 2, first)
    on_ranks(1, checkpointing.load, 1, first, second)
    on_ranks(2, checkpointing.load, 2, second)


def test_accelerate_resumes_in_fresh_processes(tmp_path):
    pytest.importorskip("accelerate")
    on_ranks(2, checkpointing.save_by_accelerate, 2, str(tmp_path))
    on_ranks(2, checkpointing.load_by_accelerate, 2, str(tmp_path))


def test_mmengine():
    pytest.importorskip("mmengine")
    on_ranks(2, programs.mmengine_replicas, 2)


def test_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    on_ranks(2, programs.trainer_replicas, 2, str(tmp_path))


def test_three_ranks():
    """Fewer rows than ranks in one layer, uneven parts in the other."""
    on_ranks(3, programs.norms_are_global, 3)


def test_a_mesh_of_two_dimensions():
    on_ranks(4, programs.two_dimensions, 4)


def test_train_gpt_example(tmp_path):
    path = Path(__file__).parents[2] / "examples/train_gpt.py"
    if not path.exists():
        pytest.skip("the examples are not here")
    on_ranks(2, programs.train_gpt_example, 2, str(path), str(tmp_path))


@pytest.mark.parametrize(
    "program",
    [
        plain_parts.pipeline_stages,
        plain_parts.experts,
        plain_parts.an_infinity_on_one_rank,
        plain_parts.grad_scaler_is_refused,
    ],
)
def test_parts_that_are_plain_tensors(program):
    on_ranks(2, program, 2)


def test_a_pipeline_of_shards():
    on_ranks(4, plain_parts.pipeline_of_shards, 4)


def test_what_a_process_group_rules_out():
    """Told before anything is computed."""
    model, group = programs.make_model(), object()
    for given in ({"counts_in_norm": bool}, {}):
        with pytest.raises(InvalidSettingError, match="process_group"):
            optimizer = SAMPa(
                model.parameters(), torch.optim.SGD, lr=0.1, process_group=group if not given else None, **given
            )
            TrainStep(model, optimizer, programs.loss_of, passes="streams")
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, process_group=group)
    with pytest.raises(InvalidSettingError, match="process_group"):
        TrainStep(model, optimizer, programs.loss_of, capture=True)(programs.data(1)[0])
    with pytest.raises(UnsupportedTensorError, match="spread over ranks"):
        StabilityMonitor(model, optimizer, programs.loss_of).measure(programs.data(1)[0])
    with pytest.raises(ValueError, match="counted"):
        Plan([torch.ones(2)], peers=Peers(group, []))
