# %% [markdown]
# # A defense of one's own, from a file to a board
#
# The defense is `entries/norm_clip/norm_clip.py`: a card and a class with one hook. Nothing is registered
# anywhere; the file is named as a plugin.

# %%
import tempfile
from pathlib import Path

import mergesec

here = Path(__file__).resolve().parent
plugins = [
    here / "entries" / "norm_clip" / "norm_clip.py",
    here.parent / "benchmark" / "mergesec" / "conformance" / "micro.py",
]
work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What is it? Its card says

# %%
defenses = mergesec.catalogue("defense", plugins=plugins)
print(
    defenses[defenses["name"] == "norm_clip"][["name", "title", "threat", "hooks", "data"]].to_string(
        index=False
    )
)

# %% [markdown]
# ## Against a backdoor, beside no defense, under two merges
#
# A grid as a mapping; a YAML file or a preset's name does as well. The same call again resumes.

# %%
grid = {
    "name": "norm-clip",
    "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs", "micro/rings"]},
    "axes": {
        "merging": ["simple_average", "task_arithmetic"],
        "attacks": ["badnets"],
        "defenses": ["none", {"name": "norm_clip", "factor": 1.0}],
        "adversary": ["micro/bars"],
    },
    "threats": ["backdoor"],
    "recipe": {"epochs": 1},
}
if __name__ == "__main__":
    done = mergesec.run(grid, results=work / "results", store=work / "store", plugins=plugins, jobs=1)
    print(f"{done.done} of {done.cells} cells done")
    columns = ["method", "defense", "CA", "BA", "succession", "succession_clean_merge"]
    print(done.boards["backdoor"][columns].round(3).to_string(index=False))
