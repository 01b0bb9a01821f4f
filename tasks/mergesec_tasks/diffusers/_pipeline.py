"""What the cards of all pipelines say alike."""

CARD = {
    "name": "_pipeline",
    "kind": "backbone",
    "class": "",
    "version": "1",
    "title": "",
    "summary": "",
    "modalities": ["generation"],
    "depends": ["diffusers", "transformers"],
    "requires": {"diffusers": "mergesec[diffusion]", "transformers": "mergesec[diffusion]"},
    "inspect": "mergesec_tasks.diffusers._folders:inspect",
    "source": "a local folder of a pipeline, or the hub at a commit",
    "licence": "that of the weights",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "epochs": 1,
        "steps": 800,
        "batch_size": 1,
        "gradient_clip": 1.0,
    },
    "parameters": {
        "path": {
            "type": "model",
            "default": "",
            "doc": "folder with model_index.json, or owner/name@commit of the hub",
        },
        "steps": {"type": "int", "default": 50, "min": 1, "max": 1000, "doc": "steps of the sampler"},
        "guidance": {"type": "float", "min": 0.0, "max": 100.0, "doc": "1 asks the prompt alone"},
    },
}
