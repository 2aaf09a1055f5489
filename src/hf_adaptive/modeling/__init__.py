"""Everything that travels with a checkpoint. One flat folder: see CONTRIBUTING.md.

The rooms, in the order in which a row walks through them.

A checkpoint is read
    `configuration.py`      the fields that exits add, and their checks
    `loading.py`            a checkpoint with exits as it is, a plain one by giving it exits
    `weight_files.py`       safetensors only, whatever a checkpoint's files ask for
    `initialising.py`       what the checkpoint lacks starts as stock's
    `architectures.py`      the backbones that can have exits, one entry each; their classes
    `bases.py`              what mixins are mixed into, as type checkers see it
A row comes in
    `examples.py`           tokenised examples, from whatever holds them
    `inputs.py`             what a backbone is given, one row an example
    `checks.py`             what else callers give, checked in one way
    `labels.py`             labels, read in one way
    `exits.py`              the classifier with exits: `forward` starts here
It goes through layers
    `layers.py`             the backbone's layers, with something to do at the exits
    `attention_layouts.py`  how an architecture's self-attention is laid out; `attention_kinds.py`, how it is called
    `constant_heads.py`     attention heads that are constant; `constant_attention.py`, what they compute
    `head_choice.py`        which heads are constant, as a user gives it
    `routing.py`            where a gradient stops
    `local_gradients.py`    SWEET's gradients, one segment at a time
It reaches an exit
    `heads.py`              the exit's own classifier, and how a sequence becomes one vector
    `answers.py`            what the exits said, and which rows go on
It leaves, or not
    `criteria.py`           what says "sure enough"; `numpy_functions.py`, the same without torch
    `decisions.py`          when rows leave, and what is learned from all answers
    `losses.py`             what the exits learn from
    `outputs.py`            what the caller gets
Rows of a whole data set
    `prediction.py`         `predict`; `streams.py`, the same for what has no length
    `scheduling.py`         which stage is run next, and on which rows
    `stages.py`             one stage of a model in torch
    `exit_profile.py`       what the exits did with the examples of a calibration
    `processes.py`          one call on several processes
The checkpoint is written
    `saving.py`             configuration, weights and code
    `switch.py`             all files of a folder at once, or none
    `stock_exit.py`         one exit as a stock classifier
Models of other kinds
    `cascade.py`            independent classifiers, one after another; `cascade_configuration.py`
    `cascade_members.py`    how those are made, called and checked
    `papa.py`               encoders with constant heads, and the papers' probe; `papa_configuration.py`
"""
