"""lmms-eval on our chat models; installed, it knows `--model internvl_jax` by its entry point.

    lmms-eval --model internvl_jax --model_args pretrained=CHECKPOINT --tasks pope,gqa …
"""

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from internvl_jax.adapters.chat import Chat, as_picture

MANIFEST = ModelManifest(
    model_id="internvl_jax", simple_class_path="internvl_jax.adapters.lmms_eval.InternVLJax"
)


class InternVLJax(lmms):
    """lmms-eval's "simple" interface: a text and pictures in, a text or a likelihood out.

    pretrained: what `internvl_jax.load` takes. batch_size is accepted and is always 1.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str = "", **more: object
    ):
        super().__init__()
        if more:
            raise ValueError(f"unknown model_args: {', '.join(more)}; there are pretrained")
        self.chat = Chat(pretrained)

    def _pictures(self, doc_to_visual, doc_id, task, split):
        document = self.task_dict[task][split][doc_id]
        return [as_picture(one) for one in doc_to_visual(document) or ()], document

    def generate_until(self, requests) -> list[str]:
        found = []
        for request in requests:
            context, settings, doc_to_visual, doc_id, task, split = request.args
            pictures, _ = self._pictures(doc_to_visual, doc_id, task, split)
            until = settings.get("until") or ()
            found.append(
                self.chat.answer(
                    context,
                    pictures,
                    max_new_tokens=int(settings.get("max_new_tokens", 128)),
                    num_beams=int(settings.get("num_beams") or 1),
                    until=[until] if isinstance(until, str) else list(until),
                )
            )
        return found

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            context, target, doc_to_visual, doc_id, task, split = request.args
            pictures, document = self._pictures(doc_to_visual, doc_id, task, split)
            answer = target if isinstance(target, str) else target(document)
            found.append(self.chat.likelihood(context, answer, pictures))
        return found

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("several rounds of questions are not offered to lmms-eval")
