"""Objectives. One file each; a file defines

Options           the task's keys in a recipe, with `kind` and `max_tokens`
HEAD              the head that it trains, which a family must have
KEYS              the keys of a record that it reads; others are named by `tuner check`
check_row(record, *, chat_template)
                  raises DataError for a record that this task cannot read, before there is a tokenizer
examples(...)     records to tokens and labels
question(...)     the prompt of a record as token ids, exactly as an endpoint renders it
reference(record) the answer that the record gives to it
"""
