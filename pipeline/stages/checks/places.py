"""The places of a recipe, as all nodes and later stages can find them."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.embed.embedders import absolute_model
from pipeline.embed.load import TIMM
from pipeline.storage.places import absolute_uri


def with_absolute_weights(config: Config) -> Config:
    """The config with full paths of the weights it starts from: workers run in other folders."""

    def full(path: str) -> str:
        return absolute_uri(path) if path and not path.startswith(TIMM) else path

    model = config.model.model_copy(update={"init": full(config.model.init)})
    runs = config.run.folder
    teacher = config.distill.teacher and absolute_model(config.distill.teacher, runs)
    distill = config.distill.model_copy(update={"teacher": teacher})
    curate = config.curate
    embedders = {
        "copy_embedder": absolute_model(curate.copy_embedder, runs),
        "embedder": curate.embedder and absolute_model(curate.embedder, runs),
    }
    places = {"against": full(curate.against), "shards": full(curate.shards)}
    curate = curate.model_copy(update=embedders | places)
    embed = config.embed
    vectors = {"model": absolute_model(embed.model, runs) if embed.model else ""}
    embed = embed.model_copy(update=vectors | {"vectors": full(embed.vectors)})
    finetune = config.finetune
    tuned = absolute_model(finetune.model, runs) if finetune.model else ""
    finetune = finetune.model_copy(update={"model": tuned})
    models = tuple(absolute_model(one, runs) for one in config.evaluate.models)
    evaluate = config.evaluate.model_copy(update={"models": models})
    sections = {"model": model, "distill": distill, "curate": curate, "embed": embed}
    sections |= {"finetune": finetune, "evaluate": evaluate}
    return config.model_copy(update=sections)
