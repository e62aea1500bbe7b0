"""A file as a person writes it, for a strict type checker; nothing runs it."""

from __future__ import annotations

from pathlib import Path

import steer

model = steer.load("smollm2-135m")
calm: steer.Artifact = steer.train_vector(model, [{"positive": "calm", "negative": "loud"}] * 4)
calm.save("calm.safetensors")
address: str = calm.push("me/calm", private=True)
edit = steer.load_edit("calm.safetensors", 0.15, layers=range(10, 15), scope="generated")
samples: steer.Samples = model.generate(
    ["Tell me of your day", [{"role": "user", "content": "Hello"}]],
    edits=[[edit], None],
    n=2,
    seed=0,
    max_new_tokens=32,
    temperature=0.8,
    reward="sentiment",
    system="Be brief.",
)
texts: list[str] = samples.texts
best: str = samples.best[0].text
for sample in samples:
    print(sample.prompt, sample.text, sample.reward, sample.weight, sample.kl)
drift = [float(kl.sum()) for kl in samples.kl_tokens]
table = samples.to_pandas()
searched = model.generate(
    "Hello", sampler="fk", num_particles=16, reward=lambda found: [len(t) for t in found], beta=0.5
)
trees = model.generate("Hello", sampler=steer.DTS(rollouts=32), reward="length", block=8)
for piece in model.generate("Hello", stream=True, max_tokens=8):
    print(piece.text)
report = steer.evaluate(model, ["Hello"], calm, strengths=[-0.1, 0.1])
steer.draw_report(report, Path("report.png"))
head = steer.train_value(model, ["Hello", "Hi"], "length")
guided = steer.generate(model, "Hello", edits=head, beta=0.025)
scores = steer.score(texts, "sentiment - 0.3*profanity", prompts=["a", "b"])

images = steer.load("fashion-ddpm")
boots: steer.Samples = images.generate("boot", sampler=steer.FKSteering(16), reward="class:boot", steps=25, seed=0)
boots.save("boots")
boots.images[0].save("first.png")
pipeline: steer.DiffusionModel = steer.load("someone/pipeline", kind="images")
endpoint: steer.EndpointModel = steer.load("openai:http://localhost:8000/v1", kind="endpoint")
