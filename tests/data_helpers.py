"""Small videos for the tests of larp_jax.data, written with PyAV."""

import numpy as np

# name: (encoder, pixel format, encoder options). Each tests a decoder in a different way.
KINDS = {
    "h264_bframes.mp4": ("libx264", "yuv420p", {"g": "12", "bf": "3", "x264-params": "scenecut=0"}),
    "h264_opengop.mkv": ("libx264", "yuv420p", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "h264_opengop.ts": ("libx264", "yuv420p", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "h264_one_keyframe.mp4": ("libx264", "yuv420p", {"g": "1000", "bf": "3"}),
    "h264_intra_refresh.mp4": ("libx264", "yuv420p", {"g": "12", "x264-params": "intra-refresh=1"}),
    "hevc_opengop.mp4": ("libx265", "yuv420p", {"x265-params": "keyint=12:bframes=4:open-gop=1:log-level=none"}),
    "mpeg4_bframes.avi": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "mpeg4_bframes.mp4": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"g": "12", "bf": "2"}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}),
    "ffv1.mkv": ("ffv1", "yuv420p", {}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "rgb.gif": ("gif", "rgb8", {}),
}


def moving_frames(count, height=48, width=64, seed=0):
    """uint8 [count, height, width, 3]: smooth noise that slides, so that no two frames are the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + count + 2, width // 8 + 2, 3))
    noise = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([noise[3 * i : 3 * i + height, :width] for i in range(count)])


def write_as(path, frames, encoder, pixel_format, options, *, times=None):
    """Encodes uint8 [T, H, W, 3] at 25 frames per second, or with presentation times in 1/1000 s."""
    import fractions

    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        if times is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            frame.pts = number if times is None else times[number]
            frame.time_base = fractions.Fraction(1, 25 if times is None else 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
