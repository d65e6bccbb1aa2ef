"""Arrow IPC files of foreign origin, read only if their content fits into a given memory.

Arrow decompresses a buffer to the size that it states, and Python cannot limit its memory: a small file can fill all of
it. So the sizes are added up first. They are in front of each buffer, and the places of the buffers in the metadata of
their message, a flatbuffer (`Message.fbs` in Arrow's format specification).
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

MAGIC_BYTES = 8
"""Length of the magic number and its padding, which precede a stream of messages in a file."""
HEADER, BUFFERS, COMPRESSION = 2, 2, 3
"""Numbers of fields: the header of a message; buffers and compression of a record batch."""


def read_arrow_table(content: bytes, schema: pa.Schema, most_bytes: int) -> pa.Table:
    """The table in the content of an Arrow IPC file. Its values are not validated.

    Args:
        content: the file.
        schema: the only schema that is accepted, without dictionaries.
        most_bytes: largest size of the decompressed table.

    Raises:
        ValueError: the file is damaged, has another schema, or is larger.
    """
    with pa.ipc.open_file(pa.BufferReader(content)) as file:
        if not file.schema.equals(schema):
            raise ValueError("other columns")
    stream = pa.BufferReader(content)
    stream.seek(MAGIC_BYTES)
    batches: list[pa.RecordBatch] = []
    for message in pa.ipc.MessageReader.open_stream(stream):
        if message.type == "record batch":
            most_bytes -= sum(buffer_sizes(message))
            if most_bytes < 0:
                raise ValueError("too large")
            batches.append(pa.ipc.read_record_batch(message, schema))
        elif message.type != "schema":
            raise ValueError(f"has a {message.type}")
    return pa.Table.from_batches(batches, schema)


def buffer_sizes(message: pa.ipc.Message) -> Iterator[int]:
    """Decompressed size in bytes of each buffer of a record batch.

    Raises:
        ValueError: the metadata is damaged.
    """
    metadata, body = message.metadata.to_pybytes(), message.body
    try:
        header = field(metadata, target(metadata, 0), HEADER)
        assert header is not None
        batch = target(metadata, header)
        at = field(metadata, batch, BUFFERS)
        if at is None:
            return
        vector = target(metadata, at)
        compressed = field(metadata, batch, COMPRESSION) is not None
        [count] = struct.unpack_from("<I", metadata, vector)
        for number in range(count):
            offset, length = struct.unpack_from("<qq", metadata, vector + 4 + 16 * number)
            [size] = struct.unpack_from("<q", body, offset) if compressed and length else [length]
            yield max(size, length)
    except struct.error as error:
        raise ValueError("damaged metadata") from error


def target(data: bytes, at: int | None) -> int:
    """The place that the offset at a place of a flatbuffer refers to.

    Raises:
        struct.error: there is none.
    """
    if at is None:
        raise struct.error("no such field")
    return at + struct.unpack_from("<I", data, at)[0]


def field(data: bytes, table: int, number: int) -> int | None:
    """The place of a field of a table of a flatbuffer; None if the table does not have it."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    [offset] = struct.unpack_from("<H", data, vtable + slot)
    return table + offset if offset else None
