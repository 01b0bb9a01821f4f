# %% [markdown]
# # Merge two experts and see what a protection and a backdoor do to the merge
#
# Cells for a notebook; as a script: `python examples/merge_and_measure.py`, seconds on one core. The suite is the
# micro world (three toy tasks); with `suite="mini"` and without `plugins` the same lines run on the mini suite.

# %%
import tempfile
from pathlib import Path

import mergesec

here = Path(__file__).resolve().parents[1]
micro = {
    "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs", "micro/rings"]},
    "plugins": [here / "benchmark" / "mergesec" / "conformance" / "micro.py"],
    "store": Path(tempfile.mkdtemp()),
}

# %% [markdown]
# ## Two experts, and their average

# %%
base = mergesec.base(**micro)
bars = mergesec.expert("micro/bars", **micro)
blobs = mergesec.expert("micro/blobs", **micro)
average = mergesec.merge(base, [bars, blobs], "simple_average")
for name, weights in {"expert": bars, "average of two": average}.items():
    found = mergesec.evaluate(weights, "micro/bars", **micro)
    print(f"bars, {name}: {found.rate:.3f} [{found.low:.3f}, {found.high:.3f}] of {found.n}")

# %% [markdown]
# ## The owner protects the expert: alone it works as before

# %%
published = mergesec.protect("micro/bars", "params", weights=bars, **micro)
alone = mergesec.evaluate(published, "micro/bars", **micro)
spoilt = mergesec.merge(base, [published, blobs], "simple_average")
merged = mergesec.evaluate(spoilt, "micro/bars", **micro)
print(f"protected: alone {alone.rate:.3f}, merged {merged.rate:.3f}")

# %% [markdown]
# ## The free-rider undoes it

# %%
recovered = mergesec.recover("micro/bars", "coupled", weights=published, **micro)
again = mergesec.merge(base, [recovered, blobs], "simple_average")
print(f"recovered: merged {mergesec.evaluate(again, 'micro/bars', **micro).rate:.3f}")

# %% [markdown]
# ## A backdoored expert, alone and in the merge, beside the same trigger on the clean average

# %%
bad = mergesec.attack("micro/bars", "badnets", **micro)
poisoned = mergesec.merge(base, [bad, blobs], "simple_average")
for name, weights in {"alone": bad, "merged": poisoned, "clean average": average}.items():
    hit = mergesec.evaluate(weights, "micro/bars", triggered=bad, **micro)
    print(f"attack success, {name}: {hit.rate:.3f} [{hit.low:.3f}, {hit.high:.3f}]")
