"""Storage to samples: sources, images, faces, splits, conversations, data sets."""

from llava.core.registry import Registry

SOURCES: Registry[type] = Registry(
    "data source",
    {
        "folder": "llava.data.stills:FolderSource",
        "csv": "llava.data.stills:CsvSource",
        "conversations": "llava.data.conversations:ConversationSource",
        "clips": "llava.data.own_clips:OwnClipSource",
        "hdf5": "llava.data.clips:Hdf5Source",
        "ffpp": "llava.data.clips:ListingSource",
        "celebdf_v2": "llava.data.clips:ListingSource",
        "dfdc": "llava.data.clips:ListingSource",
        "dfdcp": "llava.data.clips:ListingSource",
    },
)
