# %% [markdown]
# # Reading boards and records
#
# From the results that ship with the project; nothing runs, and torch is not loaded.

# %%
from pathlib import Path

import mergesec

results = Path(__file__).resolve().parents[1] / "results"
print(mergesec.boards("mini-backdoor", results))

# %% [markdown]
# ## A board is a table: rates are shares in [0, 1], with 95 % intervals beside them

# %%
board = mergesec.load_board("mini-backdoor", "backdoor", results)
wanted = board[board["method"] == "task_arithmetic"].nlargest(5, "succession")
print(
    wanted[["attack", "BA", "succession", "succession_low", "succession_high"]]
    .round(3)
    .to_string(index=False)
)

# %% [markdown]
# ## Records go further: the outcome of every test sample, so that other questions can be asked
#
# Here: which triggered samples fall for a backdoor in the merge that did not in the clean merge?

# %%
for record in mergesec.records("mini-backdoor", results):
    if record.attack == "badnets" and record.merging == "task_arithmetic" and record.status == "done":
        key = f"asr/{{}}/{record.subject}"
        hits, mask = record.counts[key.format("merge")].arrays()
        before, _ = record.counts[key.format("clean_merge")].arrays()
        print(
            f"{record.subject}, seed {record.seed}: {int((hits & ~before).sum())} of {int(mask.sum())} are new"
        )
