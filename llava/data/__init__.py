"""Storage to samples: sources, images, faces, splits, conversations, data sets."""

from llava.core.registry import Registry

SOURCES: Registry[type] = Registry(
    "data source",
    {
        "folder": "llava.data.folder:FolderSource",
        "csv": "llava.data.csv_table:CsvSource",
        "conversations": "llava.data.conversations:ConversationSource",
        "hdf5": "llava.data.hdf5:Hdf5Source",
        "ffpp": "llava.data.listing_source:ListingSource",
        "celebdf_v2": "llava.data.listing_source:ListingSource",
        "dfdc": "llava.data.listing_source:ListingSource",
        "dfdcp": "llava.data.listing_source:ListingSource",
    },
)
