"""Documents of benchmarks from local files.

- `local`: the data folder of `--data_dir`, and the tasks that read from it.
- `hub`: GSM8K and HellaSwag, which lm-eval otherwise loads from the Hugging Face Hub.
- `documents`: POPE and CHAIR; `image_questions`: MME, MMVP, AMBER and HallusionBench; `captions`: AMBER's generative part and MMHal-Bench.
- `rows`: rows of JSON and JSON Lines files.
"""

from typing import TYPE_CHECKING

from contralto.common.lazy import exports

if TYPE_CHECKING:
    from contralto.eval.data.captions import amber_documents as amber_documents
    from contralto.eval.data.captions import mmhal_documents as mmhal_documents
    from contralto.eval.data.documents import ImageDocuments as ImageDocuments
    from contralto.eval.data.documents import chair_documents as chair_documents
    from contralto.eval.data.documents import pope_documents as pope_documents
    from contralto.eval.data.documents import pope_tasks as pope_tasks
    from contralto.eval.data.hub import jsonl_dataset as jsonl_dataset
    from contralto.eval.data.image_questions import question_documents as question_documents
    from contralto.eval.data.local import TASKS as TASKS
    from contralto.eval.data.local import LocalTasks as LocalTasks
    from contralto.eval.data.local import local_tasks as local_tasks
    from contralto.eval.data.rows import Document as Document
    from contralto.eval.data.rows import dataset as dataset
    from contralto.eval.data.rows import image as image
    from contralto.eval.data.rows import rows_of as rows_of

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "captions": ["amber_documents", "mmhal_documents"],
        "documents": ["ImageDocuments", "chair_documents", "pope_documents", "pope_tasks"],
        "hub": ["jsonl_dataset"],
        "image_questions": ["question_documents"],
        "local": ["TASKS", "LocalTasks", "local_tasks"],
        "rows": ["Document", "dataset", "image", "rows_of"],
    },
)
