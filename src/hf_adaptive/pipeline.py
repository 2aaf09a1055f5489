"""A text-classification pipeline that answers lists of texts stage by stage."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, cast

from transformers import TextClassificationPipeline

from .modeling.checks import check_count, has_exits
from .tokenizing import check_tokenizer


class ExitsTextClassificationPipeline(TextClassificationPipeline):
    """A `text-classification` pipeline for models with exits and cascades.

    Lists and data sets go through `model.predict`: full batches of similar length at every exit, whatever the order of
    the texts. `batch_size` (32 unless it is given) bounds how many are run at a time. A single text, and what comes
    from a generator, is answered as by the stock pipeline.

    Raises:
        ValueError: A model without `predict`.

    Example:

        >>> classify = pipeline("text-classification", "me/sst2-exits", pipeline_class=ExitsTextClassificationPipeline)
        >>> classify(["A masterpiece.", "Far too long."])
    """

    def __init__(self, **kwargs: Any):
        # Not by its class: a model loaded with trust_remote_code has a copy of it.
        if not has_exits(kwargs.get("model")):
            raise ValueError(
                f"ExitsTextClassificationPipeline needs a model with exits or a cascade, got a "
                f"{type(kwargs.get('model')).__name__}. Leave pipeline_class out for other models."
            )
        check_tokenizer(kwargs.get("tokenizer"))
        super().__init__(**kwargs)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the stock pipeline; no texts have no answers."""
        if isinstance(inputs, Sized) and not isinstance(inputs, (str, Mapping)) and len(inputs) == 0:
            return []
        return super().__call__(inputs, *args, **kwargs)

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """Answers in the order of the inputs; called by `Pipeline.__call__`."""
        if not isinstance(inputs, Sized):
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        check_count("batch_size", batch_size)
        examples = [self._encoded(text, preprocess_params) for text in inputs]
        rows = batch_size if batch_size > 1 else 32  # 1 is what the stock pipeline passes if nothing was said
        logits = cast(Any, self.model).predict(examples, rows, show_progress=False, **forward_params).logits
        return (self.postprocess({"logits": row.unsqueeze(0)}, **postprocess_params) for row in logits)

    def _encoded(self, text: Any, preprocess_params: dict[str, Any]) -> dict[str, list[int]]:
        encoded: dict[str, Any] = self.preprocess(text, **preprocess_params)
        return {name: ids[0].tolist() for name, ids in encoded.items()}
