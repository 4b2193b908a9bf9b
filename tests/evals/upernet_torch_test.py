"""UperNet's arithmetic beside PyTorch's layers."""

import jax
import numpy as np
import pytest

from internvl_jax.evals import segmentation_heads as heads

pytestmark = pytest.mark.slow


def test_upernet_agrees_with_the_layers_of_pytorch():
    import torch
    from torch.nn import functional as F

    weights, state = heads.init_upernet(jax.random.key(0), 8, 6, 5)
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 6, 6, 8)).astype(np.float32) for _ in range(4)]
    main, helped, _ = heads.upernet(weights, state, maps, False)
    t = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), weights)
    x = [torch.from_numpy(m).permute(0, 3, 1, 2) for m in maps]

    def conv(name, x):
        own = t[name]
        y = F.conv2d(x, own["kernel"].permute(3, 2, 0, 1), padding="same")
        mean, var = torch.zeros(6), torch.ones(6)
        return F.relu(F.batch_norm(y, mean, var, own["scale"], own["bias"], eps=1e-5))

    def up(name, x):
        return F.conv_transpose2d(
            x, t[name]["kernel"].permute(0, 3, 1, 2), t[name]["bias"], stride=2
        )

    def resize(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    def classify(name, x):
        return F.conv2d(x, t[name]["kernel"].T[:, :, None, None], t[name]["bias"])

    norm = t["up_norm"]
    first = up("up0", x[0]).permute(0, 2, 3, 1)
    first = F.gelu(F.layer_norm(first, (8,), norm["scale"], norm["bias"], 1e-6))
    pyramid = [up("up1", first.permute(0, 3, 1, 2)), up("up2", x[1]), x[2], F.max_pool2d(x[3], 2)]
    top = pyramid[3]
    pools = [resize(conv(f"pool{s}", F.adaptive_avg_pool2d(top, s)), top) for s in heads.POOLS]
    levels = [conv(f"lateral{i}", pyramid[i]) for i in range(3)]
    levels.append(conv("pyramid", torch.cat([top, *pools], dim=1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + resize(levels[i + 1], levels[i])
    outputs = [conv(f"smooth{i}", levels[i]) for i in range(3)] + [levels[3]]
    fused = conv("fuse", torch.cat([resize(o, outputs[0]) for o in outputs], dim=1))
    wanted = classify("classify", fused).permute(0, 2, 3, 1)
    np.testing.assert_allclose(main, wanted, atol=2e-4)
    wanted = classify("classify_aid", conv("aid", pyramid[1])).permute(0, 2, 3, 1)
    np.testing.assert_allclose(helped, wanted, atol=2e-4)
