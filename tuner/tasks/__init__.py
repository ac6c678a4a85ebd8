"""Objectives. One file each; a file defines

Options                       the task's keys in a recipe, with `kind` and `max_tokens`
HEAD                          the head that it trains: a file in tuner/heads, which a family must have
KEYS                          the keys of a record that it reads; others are named by `tuner check`
SHAPES                        the shapes of rows that it learns from, each with the options that they want (for `tuner new`)
check_row(record, options, *, chat_template)
                              raises DataError for a record that this task cannot read, before there is a tokenizer
examples(...)                 records to examples, each with `ids` and `supervised`: how much of it is learned
objective(model, ...)         a module: `collate` makes a batch of examples, calling it gives the sum of their losses
question(...)                 what the probe asks of a record: `ids`, exactly as an endpoint renders it, and what the head needs
scores(model, ...)            figures of held-out rows beside their loss
scored(options, evaluate)     their names

and, where there is something to say:

check(options, facts)         raises RecipeError for a model that it does not suit
remarks(options, family)      what is allowed for this family and probably not meant
unseen(examples, options)     remarks on what no training example shows
told(tokenizer, options, shapes)
                              how the tokens that are learned are found, for `tuner data` and the run
shown(example, options)       a name and an Example for each part of an example, for `tuner data`; by default the example itself
proposed(shape, labels, family, facts)
                              the options for `tuner new`, where they are more than those in SHAPES
asks_first(options)           whether its loss asks the model before a step's forward pass, which ZeRO's stage 3 cannot
PASSES                        True where rows of unlike length go through the model in several passes (tuner/passes.py)
TOO_LONG                      what `tuner new` does with rows that are too long: `skip` where nothing is said
BLOCK_TOKENS                  longer documents become several; nothing is too long
unnamed(options)              whether the one output of its head has no name that would matter
serving(options)              facts for an engine
head_config(options)          what the model's configuration says of its head, such as the names of labels
loss_bytes(sizes, positions, supervised)
                              what the loss holds at a time, where it is not what its head says
reference(record)             the answer that the record gives, for tasks whose answers are text
"""

from typing import Any

from tuner import kinds
from tuner.bundle import Bundle


def labels_of(bundle: Bundle) -> list[str]:
    """What the bundle's head tells apart, in the order of its scores."""
    from tuner.source import label_names, read_config

    made = bundle.manifest.serving if bundle.manifest.kind == "adapter" else {}
    return label_names(made.get("head_config") or read_config(bundle.path))


def fits(bundle: Bundle, options: Any) -> bool:
    """The bundle has the very head that the task trains: of that kind and, where it gives labels, for these in this order."""
    task = kinds.load("tasks", options.kind)
    if bundle.manifest.head != task.HEAD:
        return False
    if not hasattr(task, "head_config"):
        return True
    from tuner.source import label_names

    own, wanted = labels_of(bundle), label_names(task.head_config(options))
    return len(own) == 1 if getattr(task, "unnamed", lambda _: False)(options) else own == wanted
