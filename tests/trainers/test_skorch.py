"""skorch calls ``optimizer.step(closure)``, and the closure runs forward and backward: each pass is one call of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sam_optim import GSAM, SAM, FriendlySAM, InvalidSettingError

from ..optim.cases import assert_same, make_net, weights_of

pytest.importorskip("skorch")
pytest.importorskip("sklearn")

SETTINGS = {"rho": 0.1, "lr": 0.05, "momentum": 0.9}


def made(method, dropout=0.0):
    from skorch import NeuralNetClassifier

    torch.manual_seed(1)
    return NeuralNetClassifier(
        make_net(torch.float32, batch_norm=True, dropout=dropout),
        criterion=nn.CrossEntropyLoss,
        optimizer=method,
        optimizer__base_optimizer=torch.optim.SGD,
        optimizer__closure_runs="every_pass",
        **{f"optimizer__{key}": value for key, value in SETTINGS.items()},
        max_epochs=2,
        batch_size=12,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
    )


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(36, 7, generator=generator)
    return x.numpy(), torch.randint(3, (36,), generator=generator).numpy()


@pytest.mark.parametrize("method", [SAM, GSAM])
def test_it_makes_the_steps_of_a_loop(method):
    x, y = data()
    net = made(method)
    model = copy.deepcopy(net.module)
    torch.manual_seed(3)
    net.fit(x, y)

    model.train()
    optimizer = method(model.parameters(), torch.optim.SGD, closure_runs="every_pass", **SETTINGS)
    torch.manual_seed(3)
    for _ in range(2):
        for xs, ys in zip(torch.from_numpy(x).split(12), torch.from_numpy(y).split(12), strict=True):

            def closure(xs=xs, ys=ys):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(xs), ys)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same(weights_of(net.module_), weights_of(model))


def test_settings_pickling_and_searching():
    from sklearn.model_selection import GridSearchCV

    x, y = data()
    net = made(SAM, dropout=0.3).fit(x, y)
    net.set_params(optimizer__rho=0.3)
    assert net.optimizer_.param_groups[0]["rho"] == 0.3
    again = pickle.loads(pickle.dumps(net))
    for own in (net, again):
        torch.manual_seed(4)
        own.partial_fit(x, y)
    assert_same(weights_of(net.module_), weights_of(again.module_))
    search = GridSearchCV(net, {"optimizer__rho": [0.0, 0.1]}, cv=2, refit=False).fit(x, y)
    assert len(search.cv_results_["mean_test_score"]) == 2


@pytest.mark.parametrize("method", [GSAM, FriendlySAM])
def test_clipping_each_pass_is_refused_where_it_changes_the_method(method):
    from skorch.callbacks import GradientNormClipping

    net = made(method).set_params(callbacks=[("clip", GradientNormClipping(0.05))])
    with pytest.raises(InvalidSettingError, match="GradientNormClipping"):
        net.fit(*data())


def test_clipping_by_a_callback_and_by_a_step_hook():
    """The callback clips every gradient, which changes nothing in the first of SAM's; the hook that of the update."""
    from skorch.callbacks import GradientNormClipping

    def clip(optimizer, args, kwargs):
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)

    found = []
    for callbacks in ([("clip", GradientNormClipping(0.05))], []):
        net = made(SAM).set_params(callbacks=callbacks).initialize()
        if not callbacks:
            net.optimizer_.register_step_pre_hook(clip)
        found.append(weights_of(net.partial_fit(*data()).module_))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
