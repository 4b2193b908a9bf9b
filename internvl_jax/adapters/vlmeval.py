"""VLMEvalKit on our chat models. In a script, before its `run.py` starts:

    from internvl_jax.adapters import vlmeval
    vlmeval.register("InternVL-Chat-JAX", "checkpoints/internvl_chat")
"""

import functools

from vlmeval.vlm.base import BaseModel

from internvl_jax.adapters.chat import Chat, as_picture


class InternVLJax(BaseModel):
    """Messages [{"type": "text" | "image", "value": …}] in, an answer out.

    model_path: what `internvl_jax.load` takes.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str, max_new_tokens: int = 128, **kwargs):
        self.chat, self.max_new_tokens = Chat(model_path), max_new_tokens

    def generate_inner(self, message, dataset=None) -> str:
        """The pictures stand before the text, as InternVL-Chat is trained."""
        pictures = [as_picture(part["value"]) for part in message if part["type"] == "image"]
        texts = [part["value"] for part in message if part["type"] == "text"]
        return self.chat.answer("\n".join(texts), pictures, self.max_new_tokens)


def register(name: str, model_path: str, **settings) -> None:
    """Put a checkpoint into VLMEvalKit's table of models under a name."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = functools.partial(InternVLJax, model_path=model_path, **settings)
