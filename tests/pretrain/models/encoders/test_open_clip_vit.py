"""The tokens of open_clip's tower against a tower written out by hand: after the last norm, before the projection."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.encoders.open_clip_vit import OpenClipVit
from tests.support import plain_clip
from tests.support.tiny_models import clip, clip_config_of, pictures

HEADS = 2


@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize("positions", ["learnable", "sincos"])
def test_tokens_are_the_class_token_and_all_patches_after_the_last_norm(pool: str, positions: str) -> None:
    """The pool and the projection belong to the contrastive model and change nothing."""
    model = clip({"pool": pool, "positions": positions})
    tower = OpenClipVit(model.visual)
    found = tower.tokens(pictures())
    expected = plain_clip.vision_tokens(model.state_dict(), pictures(), HEADS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert found.shape == (len(pictures()), tower.token_count, tower.width) == (5, 17, 16)
    without_norm = (found - found.mean(-1, keepdim=True)).square().mean(-1)
    assert not torch.allclose(without_norm, torch.ones(5, 17).double(), atol=0.05)  # the norm's weights count


def test_open_clip_s_own_features_follow_from_the_tokens() -> None:
    """The class token, projected, is what open_clip computes from the same weights."""
    import open_clip

    model = clip({})
    peer = open_clip.CLIP(**clip_config_of({})).double()
    state = model.state_dict()
    peer.load_state_dict(state | {"logit_scale": state["logit_scale"].reshape(())})
    peer.eval()
    with torch.no_grad():
        tokens = OpenClipVit(model.visual).tokens(pictures())
        expected = peer.encode_image(pictures())
    torch.testing.assert_close(tokens[:, 0] @ state["visual.proj"], expected, rtol=0, atol=1e-9)
