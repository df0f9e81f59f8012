"""Storage to samples: sources, images, faces, splits, conversations, data sets."""

from llava.core.registry import Registry

SOURCES: Registry[type] = Registry(
    "data source",
    {
        "folder": "llava.data.stills:FolderSource",
        "csv": "llava.data.stills:CsvSource",
        "conversations": "llava.data.conversations:ConversationSource",
        "clips": "llava.data.video_sources:OwnClipSource",
        "hdf5": "llava.data.clips:Hdf5Source",
        "ffpp": "llava.data.video_sources:ListingSource",
        "celebdf_v2": "llava.data.video_sources:ListingSource",
        "dfdc": "llava.data.video_sources:ListingSource",
        "dfdcp": "llava.data.video_sources:ListingSource",
    },
)
