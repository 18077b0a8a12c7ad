"""Evaluation protocols: named rules that choose the clips of a data set."""

import dataclasses
import hashlib
import json
import logging
import random
from typing import Any

from larp_jax import data
from larp_jax.data.clips import last_start
from larp_jax.data.pipeline import choose_windows
from larp_jax.data.sources import FolderSource, digests, same_videos
from larp_jax.errors import InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """A rule that chooses clips of a data set. docs/evaluation.md defines each.

    Attributes:
      split: split of a TFDS data set if its specification names none; with `fixed`, the only one allowed.
      clips: `windows` takes the consecutive windows of every video, without overlap; `one_of_each` takes one clip of
        every video, from a random first frame.
      count: number of full windows, sampled without replacement and kept in the order sampled; 0 takes all windows.
      seed: random seed.
      clip: [T, H, W] of the clips; None for any.
      videos: number of videos in the list that the protocol is defined for; 0 for any.
      fvd_resolution: side of the squares that frames are resized to before I3D resizes them again; 0 for no resizing.
      covariance: convention for the Frechet distance, one of `larp_jax.evaluation.frechet.COVARIANCES`.
      cond_frames: number of frames from which a generator predicts the others; 0 if it is class-conditional.
      fixed: whether the name stands for exactly this choice; another split or fewer clips are refused.
      held_out: whether videos that are also in the training data are left out.
    """

    split: str = "test"
    clips: str = "windows"
    count: int = 0
    seed: int = 42
    clip: tuple[int, int, int] | None = None
    videos: int = 0
    fvd_resolution: int = 0
    covariance: str = "population"
    cond_frames: int = 0
    fixed: bool = False
    held_out: bool = False


# For evaluating tokenizers.
RECONSTRUCTION = {
    "held_out": Protocol(held_out=True),
    "larp_ucf101": Protocol(split="train", clips="one_of_each", clip=(16, 128, 128), videos=9537, fixed=True),
}
# For evaluating generators.
GENERATION = {
    "larp_ucf101_generation": Protocol(split="train", count=10_000, clip=(16, 128, 128), videos=9537, fixed=True),
    "larp_k600_prediction": Protocol(
        split="validation",
        count=50_000,
        clip=(16, 128, 128),
        videos=29_739,
        fvd_resolution=64,
        cond_frames=5,
        fixed=True,
    ),
}


class ClipSet:
    """The clips of a data set that an evaluation uses, opened once and read as often as wanted.

    Args:
      spec: the data set.
      clip: length and size of the clips.
      protocol: chooses the clips; by default all windows of the split `test`.
      name: name of the protocol, for messages and records.
      max_clips: at most this many clips, spread evenly over the data set; 0 for all.
      training: data set whose videos a `held_out` protocol leaves out.

    Attributes:
      clip: as given.
      protocol: as given.
      source: the data set, opened.
      windows: (video, first frame) of each clip.

    Raises:
      InputError: the data set cannot be opened, does not match the protocol, or has no clip left.
    """

    def __init__(
        self,
        spec: str,
        clip: data.ClipSpec,
        protocol: Protocol | None = None,
        *,
        name: str = "",
        max_clips: int = 0,
        training: str = "",
    ):
        self.clip, self.protocol = clip, protocol or Protocol()
        self._spec, self._name, self._max_clips = data.parse_spec(spec), name, max_clips
        self._check()
        self.source = data.open_source(self._spec, clip, default_split=self.protocol.split)
        self._left_out = self._trained_on(training) if self.protocol.held_out else set()
        self._training = training
        self.windows = self._choose()
        wanted = self.protocol.videos
        if wanted not in (0, len(self.source)):
            logger.warning(
                "protocol %s is defined for %d videos, but data %s has %d: the numbers are not comparable",
                name,
                wanted,
                self._spec,
                len(self.source),
            )

    def __len__(self) -> int:
        return len(self.windows)

    def batches(self, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> data.Batches:
        """Batches of the clips from `larp_jax.data.eval_batches`; `batch_size` is the total over all processes."""
        return data.eval_batches(
            self.source,
            self.clip,
            batch_size=batch_size,
            windows=self.windows,
            process_index=process_index,
            process_count=process_count,
        )

    def digest(self) -> str:
        """SHA-256 of the clips: the bytes of their videos, the numbers of their first frames, and their size."""
        videos = digests(self.source, (video for video, _ in self.windows))
        content = [(videos[video], start) for video, start in self.windows]
        described = [self.clip.frames, self.clip.resolution, content]
        if self.clip.sampling:
            described.append(self.clip.sampling)
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What to record with the scores, ready for JSON."""
        protocol = self.protocol
        choice = "consecutive windows that do not overlap, of every video"
        if protocol.clips == "one_of_each":
            choice = "one clip of every video, from a random first frame"
        elif protocol.count:
            choice = f"{protocol.count} drawn without replacement of the {choice}"
        elif self._max_clips:
            choice = f"at most {self._max_clips}, spread over the {choice}"
        sampled = protocol.clips == "one_of_each" or protocol.count
        split = self._spec.split or protocol.split
        described = {
            "protocol": self._name or None,
            "data": str(self._spec),
            "split": (self.source.split or None) if isinstance(self.source, FolderSource) else split,
            "windows": choice,
            "seed": protocol.seed if sampled else None,
            "videos": len(self.source),
            "clips_chosen": len(self),
            "max_clips": self._max_clips,
            "frames": self.clip.frames,
            "resolution": self.clip.resolution,
            **self.clip.sampling,
        }
        if protocol.held_out:
            described |= {"training_data": self._training, "videos_left_out_as_trained_on": len(self._left_out)}
        if protocol.videos:
            described["videos_of_the_protocol"] = protocol.videos
        return described

    def _check(self) -> None:
        protocol, name, spec = self.protocol, self._name, self._spec
        shape = self.clip.shape[:3]
        if protocol.clip and protocol.clip != shape:
            wanted, found = ("x".join(map(str, sizes)) for sizes in (protocol.clip, shape))
            raise InputError(f"protocol {name} is defined for clips of {wanted}, not {found}; choose another")
        if protocol.fixed and spec.split not in ("", protocol.split):
            raise InputError(
                f"protocol {name} is defined for the split {protocol.split}, data {spec} names another; leave it out"
            )
        if protocol.fixed and self._max_clips:
            raise InputError(f"protocol {name} fixes the clips; leave out the protocol, or --max-clips")

    def _trained_on(self, training: str) -> set[int]:
        needed = f"protocol {self._name} leaves out the videos of the training data"
        if not training:
            raise InputError(f"{needed}, which the checkpoint does not name; add --training-data SPEC")
        try:
            trained = data.open_source(training, self.clip)
        except InputError as error:
            raise InputError(f"{needed}, which cannot be opened ({error}); add --training-data SPEC") from error
        same = same_videos(self.source, trained)
        if len(same) == len(self.source):
            raise InputError(
                f"protocol {self._name}: every video of {self._spec} is also in the training data {training}; give"
                " other --data"
            )
        return same

    def _choose(self) -> list[tuple[int, int]]:
        protocol = self.protocol
        generator = random.Random(protocol.seed)
        if protocol.clips == "one_of_each":
            lasts = (last_start(self.source.frames(video), self.clip.frames) for video in range(len(self.source)))
            return [(video, generator.randint(0, last)) for video, last in enumerate(lasts)]
        windows = choose_windows(self.source, self.clip, self._max_clips, leave_out=self._left_out)
        if not protocol.count:
            return windows
        windows = [(video, start) for video, start in windows if start + self.clip.frames <= self.source.frames(video)]
        if protocol.count > len(windows):
            raise InputError(
                f"protocol {self._name} samples {protocol.count} windows, data {self._spec} has {len(windows)}; give"
                " the complete data set"
            )
        return generator.sample(windows, protocol.count)
