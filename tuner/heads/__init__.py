"""What a model answers with. One file each, named as a task's HEAD names it; a file defines

AUTO                           the class of transformers that opens a checkpoint with this head
collate(examples, ...)         examples to one padded batch
record(model, ...)             probe questions with the model's own answers
ask(model, items, device)      the answers to recorded questions now, in the order of the items
difference(item, answer)       (differences, whether each part is the same) between a recorded answer and one now

and, where there is something to say:

LABELLED                       True where the head gives a score to each label of a list
opened(model)                  changes a model that was just opened
loss_bytes(sizes, positions, supervised)
                               what the loss holds at a time, beside the model's body (tuner/footprint.py)
describe(folder, ...)          adds what other programs read beside a checkpoint with this head
"""
