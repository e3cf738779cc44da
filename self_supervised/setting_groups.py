"""What each setting matters for, as groups of names. A new setting belongs to every group whose comment fits it."""
# fmt: off

# ---- Data: which settings a data set takes ----

PATTERNS = ("include_patterns", "exclude_patterns")  # of file names
COLUMNS = ("image_key", "label_key", "labels_from")  # of shards and Hugging Face data sets; the last of directories
SUBSET = ("data_fraction", "data_seed")  # of CUSTOM_DATA, those that packed data sets accept, too
CUSTOM_DATA = (  # of dataset_name="folder"; other data sets refuse them
    "data_path", "image_key", "label_key", *PATTERNS, "labels_from", "class_to_idx", "val_size", "test_size", *SUBSET,
    "splits_path", "pixel_range",
)
NOT_IN_LISTS = ("data_path", "splits_path", "pixel_range", "data_fraction")  # of CUSTOM_DATA, no effect on the lists
CLIPS = ("num_frames", "clip_duration", "evaluation_clips", "evaluation_crops")  # of VIDEO, the clips of an evaluation
TRAINING_ONLY = ("clip_speeds", "clip_jitter")  # of VIDEO, random choices for training clips; evaluations make none
VIDEO_READING = ("video_decoder", "decoding_threads")  # of VIDEO, allowed with images: the preset sce_video sets them
VIDEO = (  # of videos; images refuse them
    "num_frames", "clip_duration", *TRAINING_ONLY, "video_decoder", "frames_per_second", "decoding_threads",
    "video_path_prefix", "evaluation_clips", "evaluation_crops",
)
PATH_FIELDS = ("data_path", "video_path_prefix", "splits_path")  # of CUSTOM_DATA and VIDEO, places on one machine

# ---- The encoder and its input ----

MEAN_AND_STD = ("image_mean", "image_std")
SET_BY_EVALUATION = ("transform_crop_size", "pooling_size", *MEAN_AND_STD)  # what an evaluation may change
ENCODER_FACTS = (  # what files of other systems do not say
    "encoder_arch", "in_channels", "low_resolution_stem", "stem_variant", "pooling_size", "transform_crop_size",
    *MEAN_AND_STD,
)
SAME_IN_STARTING = (  # what the encoder of the starting weights shares with the trained one, besides its data set
    "dataset_name", "encoder_arch", "in_channels", "transform_crop_size", *MEAN_AND_STD, "pooling_size",
    "exif_orientation", "unreadable_images",
)
IMAGE_SETTINGS = (  # how images are read, also by the linear stage
    "dataset_name", "in_channels", "transform_crop_size", *MEAN_AND_STD, "num_data_workers", "pin_data_memory",
    "data_on_device", "pack_images", "unreadable_images", "exif_orientation", *CUSTOM_DATA,
    *(name for name in VIDEO if name not in TRAINING_ONLY),
)
FROM_PRETRAINING = (  # what the linear stage takes over
    "encoder_arch", "embedding_dim", "low_resolution_stem", "stem_variant", "pooling_size", *IMAGE_SETTINGS,
)
# what load_encoder leaves out: evaluations and linear stages use all labeled images and layers, and have room for
# activations
NOT_TAKEN_OVER = ("data_fraction", "drop_path_rate", "activation_checkpointing")

# ---- Options of programs, in the order of their help ----

EVALUATE_OPTIONS = (
    *ENCODER_FACTS, *(name for name in (*CUSTOM_DATA, *VIDEO) if name not in (*SUBSET, *TRAINING_ONLY)),
    "exif_orientation", "unreadable_images",
)
EXPORT_OPTIONS = (*ENCODER_FACTS, "embedding_dim", "dataset_name", "pixel_range", "exif_orientation")
EMBED_OPTIONS = (*ENCODER_FACTS, "dataset_name", "exif_orientation", "pixel_range", *COLUMNS, *PATTERNS, *CLIPS)

# ---- Training ----

NOT_OF_TRAINING = (  # what may differ after a complete training: speed, places, validation
    "max_epochs", "evaluate_every_n_epochs", "num_data_workers", "decoding_threads", "pin_data_memory",
    "data_on_device", "torch_compile", "activation_checkpointing", "winograd", "data_path", "splits_path",
    "unreadable_images",
)
MAKE_GROUPS = (  # what determines the optimizer's parameter groups
    "exclude_matching_parameters_from_lars", "parameter_options", "layer_decay", "encoder_lr",
)

# ---- Scores and features ----

SCORE_SETTINGS = (  # what a score of the validation depends on, beside its images
    "evaluation_clips", "evaluation_crops", "probe_on_training_set", "probe_solver", "transform_crop_size",
)
SCORED_IMAGES = (  # what determines which images are scored
    "dataset_name", "data_path", "val_size", "test_size", "data_seed", "splits_path", "labels_from", "class_to_idx",
    "image_key", "label_key", "pixel_range", *PATTERNS, "limit_val_batches", "evaluation_clips", "evaluation_crops",
    "exif_orientation", "unreadable_images",
)
# what makes scores before and after a training comparable; a moved run has its lists elsewhere
MEANING_OF_SCORES = ("evaluations", *SCORE_SETTINGS, *(name for name in SCORED_IMAGES if name != "splits_path"))
# how the encoders of a table were evaluated; the last two for protocols that train a classifier
MEASUREMENT = (*SET_BY_EVALUATION, "evaluation_clips", "evaluation_crops", "max_epochs", "batch_size")
NOT_OF_PROTOCOLS = (*TRAINING_ONLY, "decoding_threads")  # of VIDEO, what changes no protocol's result
# What does not change the features, or is hashed in another form. All others, also those added later, are part of the
# name of the directory in the cache.
NOT_OF_FEATURES = (
    "encoder_weights", "embedding_dim", "zero_init_residual", "drop_path_rate", "pooling_size",  # of the hashed encoder
    "transform_crop_size", *MEAN_AND_STD, "in_channels", "compute_statistics",  # hashed as they are resolved
    *PATH_FIELDS,  # the files found there are hashed
    "batch_size", "global_batch_size", "num_data_workers", "decoding_threads", "pin_data_memory", "data_on_device",
    "torch_compile", "winograd", "activation_checkpointing", "pack_images", "exif_orientation", "seed",
    "drop_last_batch", "lr_scaling", "lr_batch_size", *TRAINING_ONLY,
)

# ---- Checkpoints of earlier versions ----

EARLIER_DEFAULTS = {"exif_orientation": False}  # what they did, although they lack these fields
