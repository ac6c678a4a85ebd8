"""Objectives. One file each; a file defines

Options                       the task's keys in a recipe, with `kind` and `max_tokens`
HEAD                          the head that it trains: a file in tuner/heads, which a family must have
KEYS                          the keys of a record that it reads; others are named by `tuner check`
check_row(record, options, *, chat_template)
                              raises DataError for a record that this task cannot read, before there is a tokenizer
examples(...)                 records to examples, each with `ids` and `supervised`: how much of it is learned
objective(model, ...)         a module: `collate` makes a batch of examples, calling it gives the sum of their losses
question(...)                 what the probe asks of a record: `ids`, exactly as an endpoint renders it, and what the head needs
scores(model, ...)            figures of held-out rows beside their loss

and, where there is something to say:

serving(options)              facts for an engine
head_config(options)          what the model's configuration says of its head, such as the names of labels
reference(record)             the answer that the record gives, for tasks whose answers are text
"""
