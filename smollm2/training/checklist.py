"""The checks of `smollm2 doctor` and of the preflight, besides those of the model: their names and what they prove.

docs/doctor.md is generated from these texts by scripts/write_doctor_docs.py.
"""

from smollm2.analysis.checks import Check
from smollm2.training import data_checks as data
from smollm2.training import machine_checks as machine
from smollm2.training import step_checks as step
from smollm2.training.setup import Run
from smollm2.training.twin import Twin

STEP: list[Check[Twin]] = [
    Check(
        "next token",
        "loss and step",
        "Data and loss together train the model to predict the next token.",
        "The twin is trained on a sequence in which each token determines the next. Its prediction must be the next one, "
        "not the token itself (no shift) and not the one after (two shifts).",
        "A wrong label in the run's own text; the check `targets` looks at it.",
        step.check_next_token,
    ),
    Check(
        "accumulation",
        "loss and step",
        "Micro-batches have the gradient of the whole batch, also if they have different numbers of targets.",
        "A batch is taken at once and sequence by sequence.",
        "A fault that needs several ranks; tests compare those.",
        step.check_accumulation,
    ),
    Check(
        "micro-batches",
        "loss and step",
        "Each micro-batch is another part of the batch.",
        "A batch is split, and its parts are compared with its rows.",
        "-",
        step.check_micro_batches,
    ),
    Check(
        "clipping",
        "loss and step",
        "Gradients are clipped by their norm over all parameters.",
        "A limit of half the norm must halve every gradient.",
        "Whether the configured limit is a good one.",
        step.check_clipping,
    ),
    Check(
        "loss scale",
        "loss and step",
        "fp16's loss scale is out of the gradients before they are clipped.",
        "A step with a loss scale of 1,024 is compared with one without.",
        "Overflow, which only fp16 itself has.",
        step.check_loss_scale,
    ),
    Check(
        "updates",
        "loss and step",
        "The optimizers change every parameter.",
        "One step; each parameter is compared with what it was.",
        "Updates in a wrong direction; the check `overfit` sees them.",
        step.check_updates,
    ),
    Check(
        "weight decay",
        "loss and step",
        "The parameters that decay are those that training.decay names.",
        "A step with gradients of zero; what decays shrinks by rate x decay.",
        "-",
        step.check_decay,
    ),
    Check(
        "learning rates",
        "loss and step",
        "Each step gets the rate of the schedule.",
        "Rates at the start, in the warmup, at the peak, in the decay and at the end are compared with the formula, and "
        "with what the optimizers got.",
        "Steps between those that are compared.",
        step.check_rates,
    ),
    Check(
        "overfit",
        "loss and step",
        "The model learns.",
        "The twin takes some steps on one batch, whose loss must fall.",
        "Whether the run's own learning rate is a good one.",
        step.check_overfit,
    ),
    Check(
        "save",
        "machine and run",
        "A resume goes on with the same bits.",
        "The twin is saved after a step and loaded into another model; the next step of both must be bit-equal, with the "
        "random state and the position in the data.",
        "A disk that loses what it has acknowledged.",
        step.check_save,
        on_resume=True,
    ),
    Check(
        "compilation",
        "machine and run",
        "Compiled blocks compute what the uncompiled ones do.",
        "The twin's logits are compared.",
        "Shapes that only the run has.",
        step.check_compilation,
        deep=True,
    ),
]

DATA: list[Check[Run]] = [
    Check(
        "targets",
        "data",
        "Every label is the next token of the run's text.",
        "64 windows of each source are read; labels are compared with the tokens after them.",
        "Windows that were not read.",
        data.check_targets,
        on_resume=True,
    ),
    Check(
        "ends",
        "data",
        "The model is trained to stop: end-of-text tokens, and in chat end-of-turn tokens, are targets.",
        "They are counted among the tokens and among the labels of 64 windows.",
        "Text that has none.",
        data.check_ends,
        on_resume=True,
    ),
    Check(
        "tokenizer",
        "data",
        "The tokens were made by the run's tokenizer, which gives back the text that it encodes.",
        "Fingerprints are compared; excerpts of the text and hard characters are encoded and decoded.",
        "Characters that are in none of the excerpts.",
        data.check_tokenizer,
        on_resume=True,
    ),
    Check(
        "tokenizer fit",
        "data",
        "The tokenizer suits the text.",
        "Bytes per token, and the share of bytes that it does not know.",
        "A tokenizer that is good but not the best.",
        data.check_fit,
    ),
    Check(
        "coverage",
        "data",
        "The windows read the whole text.",
        "Tokens in windows are compared with all tokens.",
        "A run that ends before it has read them; the check `epochs` counts.",
        data.check_coverage,
        on_resume=True,
    ),
    Check(
        "validation",
        "data",
        "The validation text is not trained on.",
        "13-grams of at most 500,000 tokens of each split are compared.",
        "Translations and paraphrases.",
        data.check_validation,
    ),
    Check(
        "duplicates",
        "data",
        "The text does not repeat its documents.",
        "The share of tokens in repeated documents, counted when the tokens were made.",
        "Documents that are nearly equal.",
        data.check_duplicates,
    ),
    Check(
        "order",
        "data",
        "An epoch reads each window once, and the next one in another order.",
        "Up to 4,096 windows of two epochs are compared, and two batches.",
        "Windows beyond those.",
        data.check_order,
        on_resume=True,
    ),
    Check(
        "rows",
        "data",
        "The rows of the next batch are its windows.",
        "They are read one by one and compared.",
        "-",
        data.check_rows,
        on_resume=True,
    ),
    Check(
        "epochs",
        "data",
        "The run does not read its text so often that repetition teaches little.",
        "Positions of all steps are divided by the windows.",
        "-",
        data.check_epochs,
        deep=True,  # the start page says it as well
    ),
    Check(
        "special tokens",
        "data",
        "Documents contain no special tokens.",
        "They are counted among the labels of 64 windows of each source.",
        "Windows that were not read.",
        data.check_special_tokens,
    ),
    Check(
        "shards",
        "data",
        "The tokens on disk are those that were written.",
        "All shards are read and their checksums compared.",
        "Damage that a page cache hides.",
        data.check_shards,
        deep=True,
    ),
]

MACHINE: list[Check[Run]] = [
    Check(
        "attention",
        "machine and run",
        "The attention backend computes the formula.",
        "Output and gradients are compared with float64, with the run's heads.",
        "Long inputs.",
        machine.check_attention,
        on_resume=True,
    ),
    Check(
        "run folder",
        "machine and run",
        "The run folder can be written, and all checkpoints fit.",
        "A file is written; the free space is compared with the plan.",
        "Another program that fills the disk later.",
        machine.check_folder,
        on_resume=True,
    ),
    Check(
        "resources",
        "machine and run",
        "The run fits into memory.",
        "The plan's memory is compared with the device's.",
        "Memory that other programs take.",
        machine.check_resources,
        on_resume=True,
    ),
    Check(
        "threads",
        "machine and run",
        "There is a core for each thread.",
        "torch's threads are compared with the cores that this process may use.",
        "Other programs on the same cores.",
        machine.check_threads,
        on_resume=True,
    ),
    Check(
        "ranks",
        "machine and run",
        "All ranks begin with the same weights.",
        "Sums of the bits of each weight are compared.",
        "-",
        machine.check_ranks,
        on_resume=True,
    ),
]
